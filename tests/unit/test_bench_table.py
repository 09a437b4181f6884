"""Records: what is computed from samples, and the tables made from records alone."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lora_dist.bench.record import compute_ratios
from lora_dist.bench.worker import Sample

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECORDS = sorted((TOOLS / "records" / "bench").glob("*.json"))

_spec = importlib.util.spec_from_file_location("bench_table", TOOLS / "bench_table.py")
assert _spec is not None
assert _spec.loader is not None
bench_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench_table)


def build_samples(*cpu_seconds: float) -> list[Sample]:
    return [Sample(seconds=2 * value, cpu_seconds=value, loss=1.0) for value in cpu_seconds]


def test_ratios_are_taken_round_by_round() -> None:
    """A slow spell that hits both in one round leaves the ratio as it is."""
    samples = {"lora": build_samples(1.0, 10.0, 1.0), "peft": build_samples(1.5, 15.0, 1.5)}
    ratios = compute_ratios(samples, "cpu_seconds")
    assert ratios["lora/peft"] == {"median": 1.5, "p25": 1.5, "p75": 1.5}
    assert ratios["peft/lora"]["median"] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_makes_a_table(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    table = bench_table.format_record(record, path.name)
    for name, one in record["contenders"].items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {bench_table.NAMES[name]} |")]
        assert f"| {one['tokens_per_second']:.0f} |" in row
    assert record["environment"]["git"]["dirty"] in (False, None)
    assert not re.search(r"/(home|work|tmp|root)/", json.dumps(record))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_hold_their_own_samples(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    samples = {name: [Sample(**sample) for sample in one["samples"]] for name, one in record["contenders"].items()}
    assert compute_ratios(samples, record["clock"]) == record["ratios"]
