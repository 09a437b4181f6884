"""The record of what several adapters in a batch cost, on a small shape, and its table."""

import json

import torch
from processes import run_distributed
from test_latency_record import TOOLS, load_tool
from toy import MODEL

adapter_cost, adapter_cost_table = load_tool("adapter_cost"), load_tool("adapter_cost_table")


def make_record() -> dict:
    case = adapter_cost.Case(rows=4, seq_len=8, lora_rank=2, num_rounds=2)
    return adapter_cost.make_record(MODEL, case, device=torch.device("cpu"), num_threads=1)


def test_a_record_of_a_small_shape_makes_a_table() -> None:
    (record,) = run_distributed(make_record, 1)
    record = json.loads(json.dumps(record))
    assert {name: list(one) for name, one in record["batches"].items()} == {
        "forward": ["0", "1", "2", "8", "32"],
        "forward and backward": ["1", "2", "8", "32"],
    }
    assert all(len(one["samples"]) == 2 for each in record["batches"].values() for one in each.values())
    table = adapter_cost_table.format_adapter_cost(record, "x.json")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows == ["adapters in the batch", "--:", "none", "1", "2", "8", "32"]
    kept = record["switch"]["kept_bytes"]
    assert kept == MODEL.num_layers * 2 * MODEL.hidden_size**2 * 4
    assert f"{kept / 1e6:.0f} MB of base rows kept" in table
    assert (TOOLS / "adapter_cost.py").is_file()
