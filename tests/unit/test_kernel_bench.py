"""tools/kernel_bench.py: its cases are the paper's shapes, and what it measures is the adapter's real work."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_dist.lora.function import NO_COMMUNICATION

_spec = importlib.util.spec_from_file_location(
    "kernel_bench", Path(__file__).resolve().parents[2] / "tools" / "kernel_bench.py"
)
assert _spec is not None
assert _spec.loader is not None
kernel_bench = importlib.util.module_from_spec(_spec)
sys.modules["kernel_bench"] = kernel_bench
_spec.loader.exec_module(kernel_bench)

SMALL = [replace(case, hidden_size=64, num_heads=8) for case in kernel_bench.CASES]


def test_shards_are_those_of_the_models() -> None:
    shapes = {(case.model, case.linear): case.shard_shape for case in kernel_bench.CASES}
    assert shapes["gpt3_175b", "qkv"] == (3 * 12288 // 8, 12288)
    assert shapes["gpt3_175b", "fc2"] == (12288, 49152 // 8)
    assert shapes["gpt3_13b", "fc1"] == (20480 // 2, 5120)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.model}-{case.linear}")
def test_the_adapters_change_the_output_they_are_timed_on(case) -> None:
    lora = kernel_bench.build_lora(case, torch.device("cpu"))
    out_features, in_features = case.shard_shape
    x_SBH = torch.randn(5, 1, in_features)
    update_SBO = lora(x_SBH, torch.zeros(out_features, in_features), None, NO_COMMUNICATION)
    assert update_SBO.shape == (5, 1, out_features)
    assert update_SBO.abs().max() > 0


def test_a_measurement_holds_its_samples() -> None:
    row = kernel_bench.measure(SMALL[0], num_tokens=8, num_rounds=3, device=torch.device("cpu"), dtype=torch.float32)
    assert [len(values) for values in row["samples"].values()] == [3, 3]
    assert "gpt3_13b   qkv" in kernel_bench.format_rows([row])
