"""PiSSA: the same start at every topology, a model that is the base until it trains, and a plain adapter at the end."""

from pathlib import Path

import peft
import pytest
import torch
from hf_toy import (
    build_run_config,
    build_shard,
    compute_hf_logits,
    compute_logits,
    compute_peft_logits,
    count_processes,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_alone, run_distributed
from test_parity import TOLERANCE, compute_error
from toy import ALL_TARGETS, Case, build_batches, build_case, gather_whole, merge_results, reduce_gradients

from lora_dist.checkpoint.adapter import write_adapter
from lora_dist.config import LoraConfig
from lora_dist.lora.pissa import compute_principal_factors
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.adapters import find_shards
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.pissa import split_base
from lora_dist.mcore.schedule import forward_backward
from lora_dist.methods import apply_method
from lora_dist.whole import read_value

LORA = LoraConfig(rank=3, alpha=5, target_modules=ALL_TARGETS, init="pissa", rank_pattern={"o_proj": 2})
TOPOLOGIES = [
    {"tp_size": 2},
    {"tp_size": 4, "sequence_parallel": True},
    {"pp_size": 2},
    {"dp_size": 2},
    {"tp_size": 2, "dp_size": 2},
    {"tp_size": 2, "pp_size": 2},
    {"tp_size": 2, "cp_size": 2},
]


def test_the_update_is_pefts_and_the_best_of_its_rank() -> None:
    torch.manual_seed(3)
    linear = torch.nn.Linear(12, 20)
    whole = linear.weight.detach().clone()
    a, b = compute_principal_factors(whole, 4, scaling=2.5)
    u, s, vt = torch.linalg.svd(whole)
    torch.testing.assert_close(2.5 * b @ a, u[:, :4] @ torch.diag(s[:4]) @ vt[:4], atol=1e-6, rtol=0)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    torch.testing.assert_close(b @ a, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight)
    torch.testing.assert_close(whole - 2.5 * b @ a, theirs.base_layer.weight)
    assert (compute_principal_factors(-whole, 4, scaling=2.5)[0] == a).all(), "no sign may depend on chance"


def start(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """The first loss; every factor, its first gradient, and what base and adapters are together, whole."""
    gpt, trainable, topology = build_case(case)
    weights = [gpt.get_submodule(name.removesuffix(".lora")).weight for name, _ in _list_shards(gpt)]
    before = [weight.detach().clone() for weight in weights]
    split_base(gpt)
    for weight, base, (_, shard) in zip(weights, before, _list_shards(gpt), strict=True):
        a_RH, b_OR = shard.stack_factors(torch.float64)
        update = b_OR @ a_RH
        assert update.abs().max() > 1e-3
        torch.testing.assert_close(weight + update, base, atol=1e-14, rtol=0)
    loss, _ = forward_backward(gpt, build_batches(topology), seed=0, step=3, scale_loss=None)
    gradients = reduce_gradients(trainable, topology)
    factors = {f"{one.name} itself": gather_whole(one.parameter.detach(), one, topology) for one in trainable}
    return loss, gradients | factors


def _list_shards(gpt: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    shards = find_shards(gpt)
    return [(name, module) for name, module in gpt.named_modules() if module in shards]


@pytest.mark.parametrize("options", TOPOLOGIES, ids=lambda options: str(Case(**options)))
def test_every_topology_starts_and_learns_alike(options: dict) -> None:
    expected_loss, expected = merge_results([run_alone(start, Case(lora=LORA))])
    case = Case(lora=LORA, **options)
    loss, actual = merge_results(run_distributed(start, case.world_size, case))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


def write_moved(options: dict, base: Path, target: Path) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Logits at the start, and once the factors have moved and are written."""
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    config = build_run_config(model, LORA)
    method = apply_method(gpt, config)
    first = compute_logits(gpt)
    with torch.no_grad():
        for one in method.trainable:
            one.parameter.mul_(1.5)
    write_adapter(
        target,
        trainable=method.trainable,
        specs=method.specs,
        constants=method.constants,
        topology=gpt.topology,
        model=model,
        bias="none",
        read=read_value,
        base_fingerprint="base",
        task="toy",
        step=1,
        metrics={},
    )
    return first, compute_logits(gpt)


@pytest.mark.parametrize(
    "options", [{}, {"tp_size": 2}, {"tp_size": 2, "dp_size": 2}, {"pp_size": 2}, {"tp_size": 4}], ids=str
)
def test_what_is_written_is_a_plain_adapter_of_the_untouched_base(options: dict, tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "adapter"
    write_toy_checkpoint(base)
    results = run_distributed(write_moved, count_processes(options), options, base, target)
    first, moved = next(pair for pair in results if pair[0] is not None)
    whole = compute_hf_logits(base)
    assert (first - whole).abs().max() < 1e-5 * whole.abs().max()
    expected = compute_peft_logits(base, target)
    assert (moved - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (moved - first).abs().max() > 0.1 * whole.abs().max()


def test_a_rank_that_no_matrix_has_is_refused(tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"layers.0.q_proj is 32 x 32, so it has no rank 33 to start with; use at most"
    ):
        build_adapter_specs(LoraConfig(rank=33, init="pissa"), model)
