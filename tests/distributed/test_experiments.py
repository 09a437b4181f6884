"""Every experiment runs for real on this machine, shrunk, and the large ones fit the GPUs that they name."""

from pathlib import Path

import pytest
from processes import run_distributed
from tiers import few_of

from lora_dist.cli.compose import compose_config
from lora_dist.cli.schema import list_groups
from lora_dist.cli.settle import settle
from lora_dist.config import RunConfig
from lora_dist.measure.summary import SUMMARY_FILE, Summary
from lora_dist.plan.execute import compute_world_size
from lora_dist.plan.job import plan_jobs
from lora_dist.run import train

EXPERIMENTS = [name for name in list_groups()["experiment"] if not name.startswith("debug/")]


def run(overrides: list[str]) -> None:
    train(compose_config(overrides), settle)


def compose_shrunk(experiment: str, *overrides: str) -> RunConfig:
    return compose_config([f"experiment={experiment}", "debug=shrink", *overrides])


@pytest.mark.parametrize("experiment", few_of(EXPERIMENTS, "gpt3_175b_v100"))
def test_shrunk_it_runs_on_the_same_kind_of_topology(experiment: str, tmp_path: Path) -> None:
    whole = compose_config([f"experiment={experiment}"], on_paper=True).topology
    config = compose_shrunk(experiment)
    for size in ("tp_size", "pp_size"):
        assert getattr(config.topology, size) == min(2, getattr(whole, size))
    assert config.topology.sequence_parallel == whole.sequence_parallel
    overrides = [f"experiment={experiment}", "debug=shrink", "track=none", f"run_dir={tmp_path / 'run'}"]
    run_distributed(run, config.topology.tp_size * config.topology.pp_size, overrides)
    summary = Summary.read(tmp_path / "run" / SUMMARY_FILE)
    assert summary.valid_loss_after < summary.valid_loss_before
    assert (tmp_path / "run" / ("model" if config.method == "full" else "adapter")).is_dir()


def test_a_size_on_the_command_line_is_shrunk_too() -> None:
    sizes = compose_shrunk("gpt3_13b", "topology.tp_size=4", "topology.dp_size=4").topology
    assert (sizes.tp_size, sizes.pp_size, sizes.dp_size) == (2, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("experiment", "num_gpus"),
    [("gpt3_6_7b", 4), ("gpt3_13b", 8), ("gpt3_175b_h200", 4), ("gpt3_175b_h200_nf4", 1)],
)
def test_lora_without_recomputation_fits_one_replica_of_the_gpus_named(experiment: str, num_gpus: int) -> None:
    config = compose_config([f"experiment={experiment}", "topology.dp_size=1"], on_paper=True)
    [job] = plan_jobs([config])
    assert compute_world_size(config) == num_gpus
    assert (job.recompute, job.fits) == ("none", True)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_full_fine_tuning_of_175b_fits_its_192_gpus() -> None:
    config = compose_config(["experiment=gpt3_175b_v100_full", "loop.recompute=none"], on_paper=True)
    [job] = plan_jobs([config])
    assert (job.method, job.world_size, job.fits) == ("full", 192, True)
