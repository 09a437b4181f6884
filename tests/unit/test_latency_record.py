"""The latency record on a small shape: what is timed computes what it should, and the table shows the record."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import MODEL

from lora_dist.cli.compose import compose_config
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.methods.count import count_trainable

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECORDS = sorted((TOOLS / "records" / "latency").glob("*.json"))


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


latency_record, latency_table = load_tool("latency_record"), load_tool("latency_table")
CASES = [latency_record.Case(rows=2, seq_len=8, budget="0.5M", num_rounds=3)]


def make_record(dtype: str) -> dict:
    return latency_record.make_record(MODEL, CASES, device=torch.device("cpu"), dtype=dtype, num_threads=1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_record_of_a_small_shape_makes_a_table(dtype: str) -> None:
    (record,) = run_distributed(make_record, 1, dtype)
    json.dumps(record)
    (case,) = record["cases"]
    assert case["variants"].keys() == latency_table.NAMES.keys()
    for name, one in case["variants"].items():
        assert len(one["samples"]) == 3
        assert all(sample["cpu_seconds"] > 0 for sample in one["samples"])
        lines = latency_table.format_latency(record, "x").splitlines()
        (row,) = [line for line in lines if f"| {latency_table.NAMES[name]} |" in line]
        assert f"| {one['num_parameters']:,} |" in row
    assert case["ratios"]["base/adapter_h"]["median"] > 0


def test_the_command_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 128 positions on the demo base's shape."""
    monkeypatch.setattr(latency_record, "RECORDS", tmp_path)
    assert run_distributed(latency_record.main, 1, ["--model", "demo", "--device", "cpu", "--rounds", "0,0,1"]) == [0]
    record = json.loads((tmp_path / "cpu_demo.json").read_text())
    (case,) = record["cases"]
    assert (case["rows"], case["seq_len"], case["num_rounds"]) == (1, 128, 1)
    assert "| paper, RTX 8000 |" in latency_table.format_latency(record, "cpu_demo.json")


def compute_outputs() -> dict[str, torch.Tensor]:
    with latency_record.open_single_process(torch.device("cpu")) as topology:
        base = latency_record.build_shape(MODEL, topology, torch.float64)
        initialize_base(base, MODEL, seed=0)
        variants = latency_record.build_variants(base, MODEL, latency_record.SIZES["0.5M"])
        tokens = torch.arange(16)[None]
        with torch.no_grad():
            return {name: variant.gpt(tokens, tokens, None) for name, variant in variants.items()}


def test_every_variant_is_another_model_and_merging_changes_nothing() -> None:
    (outputs,) = run_distributed(compute_outputs, 1)
    torch.testing.assert_close(outputs["lora_merged"], outputs["lora"], atol=1e-9, rtol=0)
    distinct = [outputs[name] for name in ("base", "lora", "adapter_h", "adapter_l")]
    for index, one in enumerate(distinct):
        for other in distinct[:index]:
            assert (one - other).abs().max() > 1e-6


class Operators(TorchDispatchMode):
    """Every operator that runs, with the shapes and strides it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.seen.append((str(func), *((tuple(one.shape), one.stride(), one.dtype) for one in tensors)))
        return func(*args, **(kwargs or {}))


def list_operators() -> dict[str, list[tuple]]:
    found = {}
    with latency_record.open_single_process(torch.device("cpu")) as topology:
        base = latency_record.build_shape(MODEL, topology, torch.float32)
        initialize_base(base, MODEL, seed=0)
        for name, variant in latency_record.build_variants(base, MODEL, latency_record.SIZES["0.5M"]).items():
            with torch.no_grad(), Operators() as operators:
                variant.gpt(torch.arange(16)[None], torch.arange(16)[None], None)
            found[name] = operators.seen
    return found


def test_a_merged_adapter_runs_the_bases_operators_and_no_other() -> None:
    """The paper's "no additional inference latency", whatever a machine's clock says of two runs of the same work."""
    (found,) = run_distributed(list_operators, 1)
    assert found["lora_merged"] == found["base"]
    assert all(len(found[name]) > len(found["base"]) for name in ("lora", "adapter_h", "adapter_l"))


@pytest.mark.parametrize(
    ("budget", "name", "millions"),
    [("0.5M", name, 0.5) for name in ("lora", "adapter_h", "adapter_l")]
    + [("11M", name, 11) for name in ("lora", "adapter_h", "adapter_l")],
)
def test_sizes_are_the_papers_counts(budget: str, name: str, millions: float) -> None:
    """On GPT-2 medium, as table 1 rounds them; no other size comes nearer to half a million."""
    key = "lora.rank" if name == "lora" else "bottleneck.size"
    sizes = [latency_record.SIZES[budget][name] + step for step in (0, -1, 1)]
    given = ["model=gpt2_medium", f"method={name}"]
    counts = [count_trainable(compose_config([*given, f"{key}={size}"])) / 1e6 for size in sizes]
    assert f"{counts[0]:.{1 if millions < 1 else 0}f}M" == budget
    assert millions >= 1 or min(counts, key=lambda count: abs(count - millions)) == counts[0]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_are_whole(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert latency_table.format_latency(record, path.name)
    assert record["environment"]["git"]["dirty"] is False
