"""What the plan predicts on fake tensors against the same step run for real: bytes, FLOPs, collectives."""

import gc
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from allocations import Peaks, find_peaks
from plan_cases import CASES, EXPERT_LORA, EXPERTS, SPARSE, build_config
from processes import run_distributed
from tiers import few_of
from torch.profiler import ProfilerActivity, profile

from lora_dist.batch import Batch
from lora_dist.config import (
    RunConfig,
)
from lora_dist.mcore import experts, indexer, selected_attention
from lora_dist.mcore.parallel import build_topology
from lora_dist.measure.collectives import Collective, count_collectives
from lora_dist.measure.flops import count_flops
from lora_dist.measure.ledger import StaticLedger, StepLedger, measure_static, open_step_ledger
from lora_dist.measure.optimizer_state import check_optimizer_state
from lora_dist.plan.execute import build_batches, compute_world_size
from lora_dist.plan.job import execute_all
from lora_dist.plan.live_bytes import ADAPTERS, BASE, GRADIENTS, OPTIMIZER, SAVED, TRANSIENT
from lora_dist.plan.process_plan import ProcessPlan
from lora_dist.quant import weight as quant_weight
from lora_dist.run import build_engine

TOLERANCE = 0.03
NUM_GLOO_BUFFERS = 1
"""gloo, unlike NCCL, copies what it scatters or gathers."""


@dataclass
class Reality:
    """One process's step, measured by instruments that the plan has no part in."""

    held_bytes: int
    static: StaticLedger
    step: StepLedger
    state_bytes: int
    flops: int
    collectives: list[Collective]
    peaks: Peaks
    """Held when a step begins, and handed out by torch's allocator since; the least of a few steps."""


def run_for_real(config: RunConfig) -> Reality:
    topology = build_topology(config.topology, device=torch.device("cpu"), local_rank=dist.get_rank(), seed=0)
    before = count_tensor_bytes()
    engine, _ = build_engine(config, topology)
    num_batches = config.loop.global_batch_size // config.loop.micro_batch_size // topology.dp_size
    batches = [spread_tokens(batch, config) for batch in build_batches(config, topology, num_batches)]
    held_bytes = count_tensor_bytes() - before
    state = check_optimizer_state(engine.zero, engine.gpt, engine.trainable, topology)
    if config.zero.stage == 3:
        engine.train_step(batches, step=0, lr=1e-3)  # as the plan does
    with (
        open_step_ledger(engine.gpt, engine.trainable) as step,
        count_flops() as flops,
        count_collectives(topology) as collectives,
    ):
        engine.train_step(batches, step=0, lr=1e-3)
    static = measure_static(engine.gpt, engine.trainable, engine.zero)
    peaks = []
    for step_index in range(1, 4):
        start_bytes = count_tensor_bytes() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.train_step(batches, step=step_index, lr=1e-3)
        peaks.append(find_peaks(profiler) + start_bytes)
    return Reality(
        held_bytes=held_bytes,
        static=static,
        step=step,
        state_bytes=state.state_bytes,
        flops=flops.get_total_flops(),
        collectives=collectives.read(),
        # The first profile does not know the sizes of what it sees freed.
        peaks=Peaks(own=min(p.own for p in peaks[1:]), all=min(p.all for p in peaks[1:])),
    )


def spread_tokens(batch: Batch, config: RunConfig) -> Batch:
    """As a text has them: experts would not share the work on one token alone."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(config.model.vocab_size, batch.input_ids_BS.shape, generator=generator)
    return replace(batch, input_ids_BS=tokens_BS)


def count_tensor_bytes() -> int:
    """Every storage that Python can reach; those of the meta device are none."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def is_close(planned: int, real: int) -> bool:
    return planned == pytest.approx(real, rel=TOLERANCE)


ALWAYS = (
    *("lora-all-dropout-packed", "full-base-dropout", "lora-dp2-stage2"),
    *("full-dp2-stage3", "lora-nf4-double-tp2-sp-recompute", "gemma-lora-tp2-sp-packed", "latent-lora"),
    *("sinks-lora-mxfp4-tp2", "delta-lora", "whole-lora-bf16-packed-tp2", "adapter_h-pp2-recompute"),
)


@pytest.mark.parametrize("name", few_of(CASES, *ALWAYS))
def test_plan_is_what_happens(name: str) -> None:
    check_plan(build_config(**CASES[name]))


def test_plan_is_what_happens_to_stacks_of_quantised_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one product for several of them, as on a GPU in bf16: for all eight, then for two each time."""
    monkeypatch.setattr(experts, "can_group", lambda *_, **__: True)
    model = replace(EXPERTS, num_layers=1, ffn_hidden_size=512, experts_per_token=1, base_format="nf4")
    config = build_config(model=model, lora=EXPERT_LORA, topology={"tp_size": 2}, dtype="bf16")
    largest = []
    for at_once in (8, 2):
        monkeypatch.setattr(quant_weight, "_STACK_AT_ONCE", at_once * 512 * 128)
        largest.append(check_plan(config)[0].largest[TRANSIENT])
    assert largest[0] > largest[1] + 4 * 2 * 512 * 128


def test_plan_is_what_happens_in_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40, over four heads of an indexer in turn."""
    for module in (indexer, selected_attention):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 40)
    monkeypatch.setattr(indexer, "_SCORES_AT_ONCE", 1)
    check_plan(build_config(model=SPARSE, lora=EXPERT_LORA, topology={"tp_size": 2}))


def check_plan(config: RunConfig) -> list[ProcessPlan]:
    """Plan it and run it; the plans."""
    world_size = compute_world_size(config)
    stages = range(config.topology.pp_size)
    plans = execute_all([(config, world_size, stage) for stage in stages], 2)
    reality = run_distributed(run_for_real, world_size, config)
    for stage, plan in zip(stages, plans, strict=True):
        real = reality[stage * world_size // config.topology.pp_size]
        assert plan.flops == real.flops
        assert plan.collectives == real.collectives
        assert plan.largest[OPTIMIZER] == pytest.approx(real.static.optimizer_state_bytes, rel=TOLERANCE)
        weights = real.static.trainable_weight_bytes + real.static.frozen_weight_bytes
        if config.zero.stage < 3:  # which gathers weights within the step
            assert plan.ledger[BASE] + plan.ledger[ADAPTERS] == weights
        assert is_close(plan.largest[GRADIENTS], real.step.gradient_bytes)
        assert is_close(plan.largest[SAVED], real.step.activation_bytes)
        assert is_close(plan.held_bytes, real.held_bytes)
        copied = [one for one in plan.collectives if one.group != "dp" or one.op in ("reduce_scatter", "all_gather")]
        copies = [one.payload_bytes for one in copied] if world_size > 1 else []
        least = real.peaks.own - NUM_GLOO_BUFFERS * max(copies, default=0)
        assert (1 - TOLERANCE) * least <= plan.peak_bytes <= (1 + TOLERANCE) * real.peaks.all
        if config.zero.stage < 3:
            assert sum(plan.ledger.values()) == plan.peak_bytes
    return plans
