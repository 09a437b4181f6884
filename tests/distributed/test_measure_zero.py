"""Bytes under the real DeepSpeed: the optimizer state's invariant at every stage, and the ledger of one step."""

from typing import Any

import pytest
import torch
from processes import run_distributed
from toy import Case, build_batches, build_case

from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.mcore.model import ShardedGpt
from lora_dist.measure.ledger import measure_static, open_step_ledger
from lora_dist.measure.optimizer_state import check_optimizer_state
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.zero.engine import ZeroEngine, build_zero_engine

FP32, DP = 4, 2
ODD = LoraConfig(rank=1, target_modules=["q_proj"], layers=["0"], bias="lora_only")
"""Sizes that dp 3 does not divide: the partitions need padding."""


def build(case: Case, zero: ZeroConfig) -> tuple[ShardedGpt, list[TrainableParameter], Topology, ZeroEngine]:
    case.dtype = torch.float32
    gpt, trainable, topology = build_case(case)
    optim = OptimConfig(lora_plus_ratio=4.0)
    engine = build_zero_engine(
        gpt, trainable, zero=zero, optim=optim, micro_batch_size=1, dtype=torch.float32, topology=topology
    )
    return gpt, trainable, topology, engine


def check(case: Case, zero: ZeroConfig) -> tuple[int, int, int]:
    """Trainable elements of this process, checked state bytes, padding bytes."""
    gpt, trainable, topology, engine = build(case, zero)
    num_trainable = sum(getattr(one.parameter, "ds_numel", one.parameter.numel()) for one in trainable)
    state = check_optimizer_state(engine, gpt, trainable, topology)
    return num_trainable, state.state_bytes, state.padding_bytes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_state_is_12_bytes_a_trainable_parameter_over_dp(method: str, stage: int) -> None:
    case = Case(dp_size=DP, method=method)
    for num_trainable, state_bytes, padding_bytes in run_distributed(check, 2, case, ZeroConfig(stage=stage)):
        assert state_bytes == 12 * num_trainable // (1 if stage == 0 else DP)
        assert padding_bytes == 0


def test_padding_is_stated() -> None:
    """A, B and biases, of 32, 32 and 96 elements, are a group each: 36, 36 and 96 at stage 1, 33, 33 and 96 at 3."""
    for stage, num_elements in ((1, 168 // 3), (3, 162 // 3)):
        results = run_distributed(check, 3, Case(dp_size=3, lora=ODD), ZeroConfig(stage=stage))
        assert results == [(160, 12 * num_elements, 12 * num_elements - 12 * 160 // 3)] * 3


def test_offload_and_tensor_parallel_shards() -> None:
    zero = ZeroConfig(stage=1, offload_optimizer=True)
    for num_trainable, state_bytes, padding_bytes in run_distributed(check, 4, Case(tp_size=2, dp_size=DP), zero):
        assert state_bytes - padding_bytes == 12 * num_trainable // DP


def test_a_stage_that_trains_nothing_has_one_element_a_group() -> None:
    results = run_distributed(check, 2, Case(pp_size=2, lora=ODD), ZeroConfig(stage=1))
    assert [num_trainable > 0 for num_trainable, _, _ in results] == [True, False]
    num_groups = 3  # decayed, not decayed, LoRA+'s
    assert results[1][1] == 12 * 2 * num_groups  # one element, made a multiple of two


def measure_step(case: Case, stage: int) -> dict[str, Any]:
    gpt, trainable, topology, zero = build(case, ZeroConfig(stage=stage))
    before = measure_static(gpt, trainable, zero)
    engine = Engine(gpt, zero, trainable, topology, seed=0)
    with open_step_ledger(gpt, trainable) as step:
        engine.train_step(build_batches(topology), step=0, lr=1e-3)
    assert measure_static(gpt, trainable, zero) == before
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in gpt.parameters()}
    trained = sum(sizes[id(one.parameter)] for one in trainable)
    return {"static": before, "step": step, "trained": trained, "frozen": sum(sizes.values()) - trained}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ledger_of_a_lora_step(stage: int) -> None:
    case = Case(dp_size=DP, lora=LoraConfig(rank=4, target_modules=["o_proj", "up_proj"]))
    result = run_distributed(measure_step, DP, case, stage)[0]
    static, step, trained, frozen = result["static"], result["step"], result["trained"], result["frozen"]
    shards = DP if stage == 3 else 1
    assert static.trainable_weight_bytes == FP32 * trained // shards
    assert static.frozen_weight_bytes == FP32 * frozen // shards
    # Adam's own step counts are a few bytes. At stage 0 the parameters are the masters.
    state = 8 * trained if stage == 0 else 12 * trained // DP
    assert state < static.optimizer_state_bytes <= state + FP32 * 16
    assert step.gradient_bytes == FP32 * trained


def test_full_fine_tuning_saves_more_and_recomputation_less() -> None:
    """Activations of one step of the toy model, every method and recompute mode against the next."""
    lora = LoraConfig(rank=1, target_modules=["q_proj"])

    def measure(**options: Any) -> int:
        result: int = run_distributed(measure_step, 1, Case(lora=lora, **options), 1)[0]["step"].activation_bytes
        return result

    full, adapted = measure(method="full"), measure()
    selective, recomputed = measure(recompute="selective"), measure(recompute="full")
    assert recomputed < selective < adapted < full
