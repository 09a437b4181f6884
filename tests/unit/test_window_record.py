"""The record of windows: one layer under a mask and tile by tile, in turn."""

import sys
from pathlib import Path

import pytest
import torch

from lora_dist.cli.compose import compose_config

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from window_record import MASK, MODELS, TILES, describe_layer, format_rows, measure


@pytest.mark.parametrize(("name", "tp_size"), MODELS)
def test_two_ways(name: str, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    case = describe_layer(compose_config([f"model={name}", "data=fake"]).model, tp_size)
    row = measure(case, seq_len=2 * case.window, num_rounds=2, device=torch.device("cpu"), dtype=torch.float32)
    assert [len(values) for values in row["samples"].values()] == [2, 2]
    assert row["kept_bytes"][TILES] <= row["kept_bytes"][MASK]
    assert row["mask_bytes"][TILES] * 4 == row["mask_bytes"][MASK] * 3
    assert name in format_rows([row])
