"""What tools/gpu_suite.sh runs on a GPU, at a small size on pretend ones: its first run on a real one must not fail."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pretend_gpu import ROOT, find_obstacle, run_pretending
from tiers import few_of

SMALL = [
    *("model.num_layers=2", "model.hidden_size=256", "model.num_heads=8", "model.ffn_hidden_size=512"),
    *("model.vocab_size=512", "data.seq_len=64", "bench.num_rounds=2", "bench.num_warmup_rounds=1"),
]
BENCHES = dict(
    line.split("\t", maxsplit=1)
    for line in subprocess.run(
        ["bash", ROOT / "tools" / "gpu_suite.sh", "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
)


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)


def run_python(*words: str | Path) -> str:
    """What it prints."""
    done = run_pretending(*words)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def shrink(overrides: Sequence[str]) -> list[str]:
    """Without torch.compile, whose kernels Triton makes."""
    key = "bench.contenders="
    given = next(word for word in overrides if word.startswith(key))
    contenders = [one for one in given.removeprefix(key).strip("[]").split(",") if not one.endswith("_compiled")]
    return [*overrides, f"{key}[{','.join(contenders)}]", *SMALL]


@pytest.mark.parametrize("name", few_of(dict.fromkeys(BENCHES), "gpu_gpt3_6_7b_peft"))
def test_a_bench_leaves_its_record(name: str, tmp_path: Path) -> None:
    overrides = shrink(BENCHES[name].split("\t"))
    run_python("-m", "lora_dist.cli.main", "bench", *overrides, f"run_dir={tmp_path / 'run'}")
    record: dict[str, Any] = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert record["clock"] == "seconds"
    assert record["environment"]["gpus"]["devices"][0]["name"] == "pretended"
    assert len(record["contenders"]) == len(overrides[-len(SMALL) - 1].split(","))
    for measured in record["contenders"].values():
        assert measured["peak_memory"]["method"] == "cuda"
        assert measured["peak_memory"]["peak_bytes"] > measured["saved_activation_bytes"]
        losses = [sample["loss"] for sample in measured["samples"]]
        assert losses == pytest.approx([6.3, 6.3], abs=0.3), "near ln 512: what is drawn knows nothing"
    assert "pretended" in run_python("-m", "bench_table", tmp_path / "run" / "bench.json")


@pytest.mark.parametrize("file", few_of(["test_window.py", "test_context_attention.py"], "test_window.py"))
def test_what_is_marked_for_gpus_passes(file: str) -> None:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"tests/unit/{file}")
    last_line = run_python(*words).splitlines()[-1]
    assert " passed" in last_line
    assert " skipped" not in last_line


TOOLS = {
    "kernel_bench": ["--num-tokens", "16"],
    "window_record": ["--seq-len", "512"],
}


@pytest.mark.parametrize("name", few_of(TOOLS, "kernel_bench"))
def test_a_tool_leaves_its_record(name: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    words = ["--device", "cuda", "--dtype", "bf16", "--num-rounds", "2", *TOOLS[name]]
    run_python(f"tools/{name}.py", *words, "--record", record)
    assert "pretended" in record.read_text()


@pytest.mark.exhaustive
def test_packed_rows_are_measured(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    overrides = ["model=demo", "data=e2e_demo", "data.seq_len=256", "loop.micro_batch_size=2", "dtype=bf16"]
    run_python("tools/packing_record.py", "--record", record, "--rounds", "2", *overrides, "device=cuda")
    assert "pretended" in record.read_text()


LATENCY = """
import json, sys, torch
from latency_record import Case, make_record
from lora_dist.cli.compose import compose_config
model = compose_config(["model=tiny", "data=fake", "data.seq_len=32"]).model
cases = [Case(rows=2, seq_len=32, budget="0.5M", num_rounds=2)]
print(json.dumps(make_record(model, cases, device=torch.device("cuda", 0), dtype="fp16", num_threads=1)))
"""


@pytest.mark.exhaustive
def test_latency_is_measured() -> None:
    record = json.loads(run_python("-c", LATENCY).splitlines()[-1])
    assert record["clock"] == "seconds"
    assert record["environment"]["gpus"]["devices"][0]["name"] == "pretended"


def test_a_bench_that_fails_is_named_and_the_others_run() -> None:
    done = subprocess.run(
        ["bash", "tools/gpu_suite.sh", "train", "nf4"],
        env=dict(os.environ) | {"PYTHON": "false"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"[gpu] failed: {' '.join(BENCHES)}"
