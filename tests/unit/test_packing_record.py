"""The record of packing: three ways to lay out the same data, measured in turn on one model."""

import sys
from pathlib import Path

import pytest
from processes import run_distributed

from lora_dist.cli.compose import compose_config

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from packing_record import BLOCKS, MASK, PADDED, measure


def run() -> dict:
    words = ["experiment=e2e_demo", "method=lora", "track=none", "topology=single", "data.valid=null"]
    words += ["data.max_train_examples=40", "loop.micro_batch_size=1", "model.num_layers=1", "model.checkpoint=null"]
    return measure(compose_config([*words, "model.tokenizer=lora_dist/assets/demo_base"]), 2)


def test_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    [record] = run_distributed(run, 1)
    ways = record["ways"]
    assert list(ways) == [BLOCKS, MASK, PADDED]
    assert record["clock"] == "CPU seconds"
    assert record["case"]["examples_per_row"] == 3
    assert all(len(way["samples"]) == 2 and min(way["samples"]) > 0 for way in ways.values())
    assert ways[BLOCKS]["blocks_over_this"]["median"] == 1
    assert ways[PADDED]["saved_bytes"] != ways[BLOCKS]["saved_bytes"]
