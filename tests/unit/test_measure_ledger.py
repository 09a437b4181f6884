"""The byte ledger against closed forms on small modules, and the optimizer-state invariant's arithmetic."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_dist.measure.ledger import measure_static, open_activation_ledger, open_step_ledger
from lora_dist.measure.optimizer_state import check_optimizer_state, compute_num_state_elements
from lora_dist.parameters import TrainableParameter

B, H, O = 5, 8, 16  # noqa: E741
FP32 = 4


def build_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(H, O), nn.ReLU(), nn.Linear(O, H))


def describe(model: nn.Module) -> list[TrainableParameter]:
    return [
        TrainableParameter(
            name=name,
            parameter=parameter,
            full_shape=tuple(parameter.shape),
            shard_dim=None,
            tp_partial_grad=False,
            kind="base",
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def measure_peak(model: nn.Module, x: torch.Tensor) -> int:
    with open_activation_ledger(model.parameters) as ledger:
        model(x).sum().backward()
    assert ledger.current_bytes == 0
    return ledger.peak_bytes


def test_saved_once_though_two_nodes_hold_it() -> None:
    # x for the first weight's gradient; ReLU's output for ReLU and for the second weight's.
    assert measure_peak(build_mlp(), torch.randn(B, H)) == FP32 * B * (H + O)


def test_frozen_linears_save_no_input() -> None:
    model = build_mlp().requires_grad_(False)
    assert measure_peak(model, torch.randn(B, H, requires_grad=True)) == FP32 * B * O


def test_bytes_follow_the_dtype() -> None:
    model, x = build_mlp().bfloat16(), torch.randn(B, H, dtype=torch.bfloat16)
    assert measure_peak(model, x) == 2 * B * (H + O)


class SavesMore(torch.autograd.Function):
    """Saves its input and a tensor of its own, and the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, torch.zeros(3, 7, dtype=torch.float64), weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, _, weight = ctx.saved_tensors
        return dy @ weight.t(), None


def test_custom_functions_are_seen_and_weights_left_out() -> None:
    weight = nn.Parameter(torch.randn(H, H))
    with open_activation_ledger(lambda: [weight]) as ledger:
        SavesMore.apply(torch.randn(B, H, requires_grad=True), weight).sum().backward()
    assert ledger.peak_bytes == FP32 * B * H + 8 * 21
    assert ledger.current_bytes == 0


def test_checkpointing_holds_one_region_at_a_time() -> None:
    blocks = nn.ModuleList(build_mlp() for _ in range(3))
    x = torch.randn(B, H, requires_grad=True)
    with open_activation_ledger(blocks.parameters) as ledger:
        hidden = x
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=True)
        inputs = FP32 * B * H * 3
        assert ledger.current_bytes == inputs
        hidden.sum().backward()
        # The last region's recomputed ReLU output comes on top; its input is counted already.
        assert ledger.peak_bytes == inputs + FP32 * B * O
    assert ledger.current_bytes == 0


def test_peak_is_over_microbatches_in_flight() -> None:
    model = build_mlp()
    one = FP32 * B * (H + O)
    with open_activation_ledger(model.parameters) as ledger:
        losses = [model(torch.randn(B, H)).sum() for _ in range(3)]
        for loss in losses:
            loss.backward()
        for _ in range(5):
            model(torch.randn(B, H)).sum().backward()
    assert ledger.peak_bytes == 3 * one
    assert ledger.current_bytes == 0


def test_a_graph_that_never_runs_backward_is_released() -> None:
    with open_activation_ledger() as ledger:
        y = torch.randn(B, H, requires_grad=True).exp()  # saves its own output
        assert ledger.current_bytes == FP32 * B * H
        del y
        gc.collect()
        assert ledger.current_bytes == 0


def test_values_and_gradients_are_unchanged() -> None:
    model, x = build_mlp(), torch.randn(B, H, requires_grad=True)
    expected = torch.autograd.grad(model(x).exp().sum(), x)[0]
    with open_activation_ledger(model.parameters):
        actual = torch.autograd.grad(model(x).exp().sum(), x)[0]
    assert torch.equal(actual, expected)


def test_step_ledger_counts_trainable_gradients_once() -> None:
    model = build_mlp()
    model[0].requires_grad_(False)
    with open_step_ledger(model, describe(model)) as ledger:
        for _ in range(2):
            model(torch.randn(B, H)).sum().backward()
    assert ledger.gradient_bytes == FP32 * (O * H + H)
    assert ledger.activation_bytes == FP32 * B * O


def build_adam(model: nn.Module) -> SimpleNamespace:
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(B, H)).sum().backward()
    adam.step()
    adam.zero_grad()
    return SimpleNamespace(adam=adam, stage=0, deepspeed=None, placeholders=[])


def test_static_ledger_by_storage() -> None:
    model = build_mlp()
    model[0].requires_grad_(False)
    model.register_buffer("table", torch.zeros(10))
    model.register_buffer("view_of_table", model.table[:5])
    ledger = measure_static(model, describe(model), build_adam(model))
    assert ledger.trainable_weight_bytes == FP32 * (O * H + H)
    assert ledger.frozen_weight_bytes == FP32 * (O * H + O + 10)
    # Two moments, and a step count for each of two parameters; the masters are the weights.
    assert ledger.optimizer_state_bytes == 2 * FP32 * (O * H + H) + 2 * FP32


def test_state_elements_of_each_stage() -> None:
    sizes = [[7, 10], [5]]
    assert compute_num_state_elements(sizes, stage=0, num_partitions=4) == 22
    assert compute_num_state_elements(sizes, stage=1, num_partitions=4) == (24 + 8) // 4
    assert compute_num_state_elements(sizes, stage=2, num_partitions=2) == (20 + 8) // 2
    assert compute_num_state_elements(sizes, stage=3, num_partitions=4) == 2 + 3 + 2


TOPOLOGY = SimpleNamespace(zero_size=1, global_rank=0)


def test_invariant_holds_for_plain_adam() -> None:
    model = build_mlp()
    model[0].requires_grad_(False)
    state = check_optimizer_state(build_adam(model), model, describe(model), TOPOLOGY)
    assert (state.state_bytes, state.padding_bytes) == (12 * (O * H + H), 0)


def test_invariant_sees_state_of_a_frozen_parameter() -> None:
    model = build_mlp()
    zero = build_adam(model)
    trainable = describe(model)[1:]
    with pytest.raises(RuntimeError, match=r"frozen parameters .*: 0.weight"):
        check_optimizer_state(zero, model, trainable, TOPOLOGY)


def test_invariant_sees_a_gradient_of_a_frozen_parameter() -> None:
    model = build_mlp()
    model[0].requires_grad_(False)
    zero = build_adam(model)
    model[0].weight.grad = torch.zeros(O, H)
    with pytest.raises(RuntimeError, match=r"1 frozen parameters .*: 0.weight"):
        check_optimizer_state(zero, model, describe(model), TOPOLOGY)


def test_invariant_sees_a_wrong_size() -> None:
    model = build_mlp()
    zero = build_adam(model)
    next(iter(zero.adam.state.values()))["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"takes \d+ bytes on global_rank 0, not 12 x 280 = 3360"):
        check_optimizer_state(zero, model, describe(model), TOPOLOGY)


def test_invariant_sees_a_parameter_the_optimizer_lacks() -> None:
    model = build_mlp()
    zero = build_adam(model)
    extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="lacks 2 of 6"):
        check_optimizer_state(zero, model, describe(model) + describe(extra), TOPOLOGY)
