"""Low precision: fp32 factors over bf16 and fp16 bases, loss scaling, skipped steps, and full fine-tuning's masters."""

from dataclasses import replace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import run_distributed
from toy import Case, build_batches, build_case

from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.zero.engine import build_zero_engine

OPTIM = OptimConfig(lr=3e-3, eps=1e-4)
LORA = Case(lora=LoraConfig(rank=3, target_modules=["all"], bias="all"))
Curve = tuple[list[float], list[float], set[str]]


def build_engine(case: Case, stage: int) -> Engine:
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=stage),
        optim=OPTIM,
        micro_batch_size=1,
        dtype=case.dtype,
        topology=topology,
    )
    return Engine(gpt, zero, trainable, topology, seed=0)


def train(case: Case, stage: int) -> Curve:
    """Losses, loss scales, and the dtypes of what trains."""
    engine = build_engine(case, stage)
    losses, scales = [], []
    for step in range(6):
        result = engine.train_step(build_batches(engine.topology, seed=step % 2), step=step, lr=OPTIM.lr)
        losses.append(result.loss)
        scales.append(result.loss_scale)
        assert not result.skipped
    return losses, scales, {str(one.parameter.dtype) for one in engine.trainable}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "stage"), [({}, 0), ({"dp_size": 2}, 1), ({"tp_size": 2, "pp_size": 2}, 1), ({"dp_size": 2}, 3)]
)
def test_lora_over_a_low_precision_base(dtype: torch.dtype, options: dict, stage: int) -> None:
    exact = run_distributed(train, 1, replace(LORA, dtype=torch.float32), 0)[0][0]
    case = replace(LORA, dtype=dtype, **options)
    for losses, scales, dtypes in run_distributed(train, case.world_size, case, stage):
        assert losses == pytest.approx(exact, abs=0.02)
        assert scales == [4096.0 if dtype == torch.float16 else 1.0] * 6
        assert dtypes == {"torch.float32"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "stage"), [({"dp_size": 2}, 1), ({"tp_size": 2, "dp_size": 2}, 2), ({"dp_size": 2}, 3)]
)
def test_full_fine_tuning_in_low_precision(dtype: torch.dtype, options: dict, stage: int) -> None:
    full = replace(LORA, method="full")
    exact = run_distributed(train, 1, replace(full, dtype=torch.float32), 0)[0][0]
    case = replace(full, dtype=dtype, **options)
    for losses, _, dtypes in run_distributed(train, case.world_size, case, stage):
        assert losses == pytest.approx(exact, abs=0.03)
        assert dtypes == {str(dtype)}


def test_a_cpu_without_instructions_for_fp16_trains_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own answer there is to refuse, and with it to plan a job in fp16."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False, raising=False)
    case = Case(method="full", dtype=torch.float16)
    ((_, _, dtypes),) = run_distributed(train, 1, case, 1)
    assert dtypes == {"torch.float16"}


def poisoned_step(case: Case, stage: int) -> tuple[list[bool], list[float], bool, int]:
    engine = build_engine(case, stage)
    skipped, scales, unchanged = [], [], False
    for step in range(4):
        handle = None
        if step == 1 and engine.topology.global_rank == 0:
            handle = engine.trainable[0].parameter.register_hook(lambda gradient: gradient * float("inf"))
        before = [one.parameter.detach().clone() for one in engine.trainable]
        result = engine.train_step(build_batches(engine.topology, seed=step), step=step, lr=OPTIM.lr)
        if handle is not None:
            handle.remove()
        skipped.append(result.skipped)
        scales.append(result.loss_scale)
        if step == 1:
            unchanged = all(torch.equal(a, one.parameter) for a, one in zip(before, engine.trainable, strict=True))
    return skipped, scales, unchanged, engine.zero.num_steps


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_infinite_gradient_on_one_process_skips_the_step_on_all(stage: int) -> None:
    case = replace(LORA, dtype=torch.float16, dp_size=2)
    for skipped, scales, unchanged, num_steps in run_distributed(poisoned_step, 2, case, stage):
        assert skipped == [False, True, False, False]
        assert scales == [4096.0, 4096.0, 2048.0, 2048.0]
        assert unchanged
        assert num_steps == 3
