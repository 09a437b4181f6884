"""Low precision: fp32 factors over bf16 and fp16 bases, loss scaling, skipped steps, and full fine-tuning's masters."""

from dataclasses import replace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import run_alone, run_distributed
from tiers import exhaustive, few_of
from toy import Case, build_batches, build_case

from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.zero import loss_scale
from lora_dist.zero.engine import build_zero_engine

OPTIM = OptimConfig(lr=3e-3, eps=1e-4)
LORA = Case(lora=LoraConfig(rank=3, target_modules=["all"], bias="all"))
Curve = tuple[list[float], list[float], set[str]]


def build_engine(case: Case, stage: int, optim: OptimConfig = OPTIM) -> Engine:
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=stage),
        optim=optim,
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
    ("options", "stage"),
    [({}, 0), ({"dp_size": 2}, 1), ({"tp_size": 2, "pp_size": 2}, 1), ({"cp_size": 2}, 1), ({"dp_size": 2}, 3)],
)
def test_lora_over_a_low_precision_base(dtype: torch.dtype, options: dict, stage: int) -> None:
    exact = run_alone(train, replace(LORA, dtype=torch.float32), 0)[0]
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
    exact = run_alone(train, replace(full, dtype=torch.float32), 0)[0]
    case = replace(full, dtype=dtype, **options)
    for losses, _, dtypes in run_distributed(train, case.world_size, case, stage):
        assert losses == pytest.approx(exact, abs=0.03)
        assert dtypes == {str(dtype)}


def grow(case: Case, stage: int, interval: int) -> list[tuple[float, float]]:
    """Loss scale and the norm of the gradient that Adam took, with beta1 = 0 its first moment."""
    loss_scale._GROWTH_INTERVAL = interval
    engine = build_engine(case, stage, replace(OPTIM, beta1=0.0, clip_grad_norm=0.0))
    taken = []
    for step in range(4):
        result = engine.train_step(build_batches(engine.topology, seed=step % 2), step=step, lr=OPTIM.lr)
        moments = [engine.zero.read_state(one)["exp_avg"] for one in engine.trainable if one.owned]
        norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
        assert result.grad_norm == pytest.approx(norm, rel=1e-2)
        taken.append((result.loss_scale, norm))
    return taken


@pytest.mark.parametrize("stage", few_of([1, 2, 3], 2))
def test_a_growing_loss_scale_leaves_the_gradient_alone(stage: int) -> None:
    case = Case(method="full", dtype=torch.float16, dp_size=2)
    steady, growing = (run_distributed(grow, 2, case, stage, interval)[0] for interval in (1000, 2))
    assert [scale for scale, _ in growing] == [4096.0, 4096.0, 8192.0, 8192.0]
    assert [norm for _, norm in growing] == pytest.approx([norm for _, norm in steady], rel=1e-2)


def diverge(case: Case, stage: int) -> str:
    engine = build_engine(case, stage)
    for one in engine.trainable:
        one.parameter.register_hook(lambda gradient: gradient * float("inf"))
    try:
        for step in range(25):
            assert engine.train_step(build_batches(engine.topology), step=step, lr=OPTIM.lr).skipped
    except ValueError as error:
        return f"{step}: {error}"
    return "went on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "stage"), [("lora", 1), *exhaustive(("full", 1), ("full", 3))])
def test_a_run_that_diverged_ends(method: str, stage: int, dtype: torch.dtype) -> None:
    case = replace(LORA, method=method, dtype=dtype, dp_size=2)
    for message in run_distributed(diverge, 2, case, stage):
        assert message.startswith("19: 20 steps in a row had gradients that are not finite (loss scale 1); lower optim")


def resume_scale(dtype: torch.dtype, stored: dict[str, float] | None) -> dict[str, float]:
    """What a checkpoint of a run holds that went on from `stored`."""
    zero = build_engine(replace(LORA, dtype=dtype), 1).zero
    if stored is not None:
        zero.write_loss_scale(stored)
    return zero.read_loss_scale()


def test_the_scale_of_another_dtype_is_not_taken_over() -> None:
    plain, scaled = (run_distributed(resume_scale, 1, dtype, None)[0] for dtype in (torch.float32, torch.float16))
    low = scaled | {"value": 1.0, "num_good_steps": 3}
    for dtype, stored, expected in (
        (torch.float16, plain, scaled),
        (torch.float32, low, plain),
        (torch.float16, low, low),
        (torch.float16, {"cur_scale": 8.0}, scaled),
    ):
        assert run_distributed(resume_scale, 1, dtype, stored) == [expected]


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


@pytest.mark.parametrize(("method", "stage"), [("lora", 0), ("lora", 1), ("lora", 2), ("full", 1), ("full", 2)])
def test_an_infinite_gradient_on_one_process_skips_the_step_on_all(method: str, stage: int) -> None:
    case = replace(LORA, method=method, dtype=torch.float16, dp_size=2)
    for skipped, scales, unchanged, num_steps in run_distributed(poisoned_step, 2, case, stage):
        assert skipped == [False, True, False, False]
        assert scales == [4096.0, 4096.0, 2048.0, 2048.0]
        assert unchanged
        assert num_steps == 3
