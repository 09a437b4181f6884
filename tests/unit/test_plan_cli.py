"""`lora-dist plan` from the command line: no GPU, no files, any experiment; a table, plan.json and a picture."""

import json
from pathlib import Path

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.cli.main import main
from lora_dist.cli.schema import list_groups
from lora_dist.plan.execute import compute_world_size, require_hardware

TINY = ["model=tiny", "model.num_layers=4", "data=fake", "data.seq_len=32", "loop.global_batch_size=32"]


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    overrides = ["hardware=v100_32gb", "dtype=fp16", "topology.pp_size=2", "plan.recompute=[none]"]
    overrides.append("loop.recompute=auto")
    assert main(["plan", *TINY, *overrides, f"run_dir={run_dir}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("loop.recompute=auto is left out: plan.recompute=['none'] says what is planned; name au")
    assert "tiny on 2 x v100_32gb: tp 1 x pp 2 x dp 1, fp16, ZeRO 1" in printed
    content = json.loads((run_dir / "plan.json").read_text())
    assert [(job["method"], job["recompute"], job["fits"]) for job in content["jobs"]] == [
        ("lora", "none", True),
        ("full", "none", True),
    ]
    lora, full = content["jobs"]
    assert [process["stage"] for process in lora["processes"]] == ["first", "last"]
    assert [process["num_in_flight"] for process in lora["processes"]] == [2, 1]
    assert lora["num_trainable"] == 4 * 2 * 4 * (64 + 64)
    assert lora["flops"] < full["flops"]
    assert (run_dir / "memory.png").stat().st_size > 10_000


def test_a_plan_needs_the_targets_of_what_it_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = ["model=deepseek_v3", "debug=shrink", "method=adapter_h", f"run_dir={tmp_path / 'run'}"]
    assert main(["plan", *latent]) == 2
    errors = capsys.readouterr().err
    assert "'q_proj' matches nothing; there are down_proj" in errors
    assert errors.endswith("in compare and plan with compare.methods=\n")
    assert main(["plan", *latent, "compare.methods=[adapter_h]", "plan.recompute=[full]"]) == 0
    assert [job["method"] for job in json.loads((tmp_path / "run" / "plan.json").read_text())["jobs"]] == ["adapter_h"]


def test_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU is made so small that one cannot hold the weights and activations of all layers."""
    overrides = ["plan.search=true", "plan.num_gpus=2", "hardware.memory_gib=0.00135", "hardware.reserved_gib=0"]
    assert main(["plan", *TINY, *overrides, f"run_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit:" in printed
    candidates = json.loads((tmp_path / "run" / "search.json").read_text())["candidates"]
    assert {one["name"] for one in candidates} == {"tp1 pp1 dp2", "tp1 pp2 dp1", "tp2 pp1 dp1"}
    for one in candidates:
        assert (one["job"] is None) == (one["reason"] is not None)
    rates = [one["job"]["tokens_per_sec_per_gpu"] for one in candidates if one["job"]]
    assert rates == sorted(rates, reverse=True)


def test_the_jobs_own_layers_are_planned_and_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["loop.recompute=selective", "loop.recompute_layers=3", "plan.recompute=[none]", "compare.methods=[lora]"]
    assert main(["plan", *TINY, *own, f"run_dir={tmp_path / 'plan'}"]) == 0
    jobs = json.loads((tmp_path / "plan" / "plan.json").read_text())["jobs"]
    assert [job["recompute"] for job in jobs] == ["none", "selective in 3 layers of each stage"]
    between = sum(max(process["peak_bytes"] for process in job["processes"]) for job in jobs) / 2 / 2**30
    capsys.readouterr()
    small = [f"hardware.memory_gib={between}", "hardware.reserved_gib=0", "plan.search=true", "plan.num_gpus=1"]
    assert main(["plan", *TINY, *own, *small, f"run_dir={tmp_path / 'search'}"]) == 0
    printed = capsys.readouterr().out
    assert "selective in 3 layers of each stage" in printed
    assert "fewest GPUs a replica with recompute selective: 1 (tp1 pp1)" in printed


@pytest.mark.parametrize("experiment", list_groups()["experiment"])
def test_every_experiment_can_be_planned(experiment: str) -> None:
    """Composes without the user's files, for hardware that computes in its dtype."""
    config = compose_config([f"experiment={experiment}"], on_paper=True)
    assert require_hardware(config).memory_gib > 0
    assert compute_world_size(config) >= 1
