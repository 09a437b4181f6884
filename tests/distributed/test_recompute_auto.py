"""loop.recompute=auto finds the least recomputation that fits, and the job then runs with it."""

from dataclasses import replace

import pytest
from processes import run_distributed

from lora_dist.cli.compose import compose_config
from lora_dist.cli.settle import settle
from lora_dist.config import HardwareConfig, RunConfig
from lora_dist.measure.summary import Summary
from lora_dist.plan.job import GIB, JobPlan, plan_jobs
from lora_dist.plan.recompute import choose_recompute
from lora_dist.run import train

NUM_LAYERS = 6


def compose(*overrides: str) -> RunConfig:
    """Rows so long that activations outweigh everything else."""
    sizes = [f"model.num_layers={NUM_LAYERS}", "model.max_position_embeddings=512", "data.seq_len=512"]
    fixed = ["experiment=debug/tiny_lora", "topology=single", "data=fake", "track=none", "device=cpu", "hardware=cpu"]
    return compose_config([*fixed, *sizes, "loop.num_steps=2", "loop.micro_batch_size=4", *overrides])


def limit(config: RunConfig, num_bytes: float) -> RunConfig:
    """On hardware that has so much memory."""
    assert isinstance(config.hardware, HardwareConfig)
    return replace(config, hardware=replace(config.hardware, memory_gib=num_bytes / GIB), run_dir=config.run_dir)


def plan(config: RunConfig, kind: str, num_layers: int | None = None) -> JobPlan:
    loop = replace(config.loop, recompute=kind, recompute_layers=num_layers)
    return plan_jobs([replace(config, loop=loop)])[0]


@pytest.fixture(scope="module")
def needs() -> dict[str, int]:
    """Bytes with nothing and with everything recomputed."""
    return {kind: plan(compose(), kind).needed_bytes for kind in ("none", "full")}


def test_nothing_is_recomputed_where_that_fits(needs: dict[str, int]) -> None:
    chosen = choose_recompute(limit(compose("loop.recompute=auto"), needs["none"]))
    assert chosen.loop.recomputation == "none"


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.9, 0.5, 0.15])
def test_no_layer_more_than_needed(needs: dict[str, int], share: float) -> None:
    config = limit(compose("loop.recompute=auto"), needs["full"] + share * (needs["none"] - needs["full"]))
    chosen = choose_recompute(config)
    kind, num_layers = chosen.loop.recompute, chosen.loop.recompute_layers or NUM_LAYERS
    job = plan(config, kind, num_layers)
    assert job.fits
    assert num_layers == 1 or not plan(config, kind, num_layers - 1).fits
    others = [plan(config, other, n) for other in ("selective", "full") for n in range(1, NUM_LAYERS + 1)]
    assert job.step_seconds == min(other.step_seconds for other in others if other.fits)


def test_more_than_everything_recomputed_is_refused_with_the_bytes(needs: dict[str, int]) -> None:
    config = limit(compose("loop.recompute=auto"), needs["full"] - 1)
    with pytest.raises(ValueError, match=r"GiB with every layer recomputed, .* use more GPUs"):
        choose_recompute(config)


def train_settled(config: RunConfig) -> Summary:
    return train(config, settle)


@pytest.mark.exhaustive
def test_a_run_settles_and_says_what_it_recomputes(needs: dict[str, int], tmp_path) -> None:
    between = (needs["none"] + needs["full"]) / 2
    config = limit(
        compose("loop.recompute=auto", "topology=pp2", "loop.global_batch_size=8", f"run_dir={tmp_path}"), between
    )
    [summary, _] = run_distributed(train_settled, 2, config)
    settled = choose_recompute(config)
    assert summary.setup.recompute == settled.loop.recomputation
    assert "auto" not in summary.setup.recompute


def test_auto_needs_to_know_the_memory() -> None:
    with pytest.raises(ValueError, match="hardware is not set"):
        choose_recompute(replace(compose("loop.recompute=auto"), hardware=None))
