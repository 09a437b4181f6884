"""Experts mixed by the fused function against autograd over each expert's own products, adapters on them or not."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lora_dist.base_format import BLOCK, LinearShape
from lora_dist.lora.experts import Factors
from lora_dist.lora.row_groups import RowGroups
from lora_dist.mcore.gates import GateBounds
from lora_dist.mcore.mixing import mix_experts
from lora_dist.measure.flops import count_flops
from lora_dist.quant import weight as quant_weight
from lora_dist.quant.weight import QuantizedWeight

T, C, E, H, FEATURES, K = 7, 2, 4, 12, 8, 4


def draw(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=draw.dtype, generator=draw.generator).requires_grad_(requires_grad)


draw.generator, draw.dtype = torch.Generator(), torch.float64


def mix_one_by_one(
    tokens_TH: torch.Tensor,
    weights_TC: torch.Tensor,
    choices_TC: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    first_factors: Factors | None,
    second_factors: Factors | None,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    bounds: GateBounds | None = None,
) -> torch.Tensor:
    rows = []
    for token, choice in itertools.product(range(T), range(C)):
        expert = int(choices_TC[token, choice])
        matrices = []
        for weights, factors in ((first, first_factors), (second, second_factors)):
            update = 0 if factors is None else factors[1][expert] @ factors[0][expert]
            matrices.append(weights[expert] + update)
        added = (0, 0) if biases is None else (biases[0][expert], biases[1][expert])
        gate, up = (matrices[0] @ tokens_TH[token] + added[0]).chunk(2)
        inner = F.silu(gate) * up
        if bounds is not None:
            gate, up = gate.clamp(max=bounds.limit), up.clamp(-bounds.limit, bounds.limit)
            inner = gate * torch.sigmoid(bounds.alpha * gate) * (up + 1)
        rows.append(weights_TC[token, choice] * (matrices[1] @ inner + added[1]))
    return torch.stack(rows).view(T, C, -1).sum(1)


@pytest.mark.parametrize("adapted", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("below_trains", [False, True])
@pytest.mark.parametrize("experts_train", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("grouped", "dtype", "tolerance"), [(False, torch.float64, 1e-12), (True, torch.float32, 2e-5)], ids=str
)
def test_output_and_gradients(
    adapted: tuple[bool, bool],
    below_trains: bool,
    experts_train: bool,
    biased: bool,
    grouped: bool,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has the grouped product too, in fp32 at the most. With biases the gate has bounds, which some exceed."""
    draw.generator.manual_seed(0)
    monkeypatch.setattr(draw, "dtype", dtype)
    tokens_TH, weights_TC = draw(T, H, requires_grad=below_trains), draw(T, C, requires_grad=below_trains)
    choices_TC = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3], [3, 0], [0, 1]])  # none is the third one's
    sizes = ((2 * FEATURES, H), (H, FEATURES))
    weights = [draw(E, *size, requires_grad=experts_train) for size in sizes]
    factors = [
        (draw(E, K, size[1]), draw(E, size[0], K)) if wanted else None
        for size, wanted in zip(sizes, adapted, strict=True)
    ]
    options = {}
    if biased:
        biases = tuple(draw(E, size[0], requires_grad=experts_train) for size in sizes)
        options = {"biases": biases, "bounds": GateBounds(alpha=1.702, limit=2.0)}
    inputs = [tokens_TH, weights_TC, *weights, *options.get("biases", ()), *(factors[0] or ()), *(factors[1] or ())]
    inputs = [one for one in inputs if one.requires_grad]
    if not inputs:
        return
    doutput_TH = draw(T, H, requires_grad=False)
    computed = []
    for mix in (partial(mix_experts, grouped=grouped), mix_one_by_one):
        output_TH = mix(tokens_TH, weights_TC, choices_TC, *weights, *factors, **options)
        grads = torch.autograd.grad(output_TH, inputs, doutput_TH, materialize_grads=True)
        computed.append([output_TH.detach(), *grads])
    assert all(grad.abs().max() > 0 for grad in computed[0][1 : 1 + 2 * below_trains])
    for actual, expected in zip(*computed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def quantize(base_format: str, weights_EOH: torch.Tensor, *, column_parallel: bool) -> QuantizedWeight:
    out_features, in_features = weights_EOH.shape[1:]
    shape = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
    quantized = QuantizedWeight(base_format, shape, num_experts=len(weights_EOH))
    quantized.fill(weights_EOH)
    return quantized


@pytest.mark.parametrize("base_format", ["nf4", "nf4_double", "fp8"])
@pytest.mark.parametrize(("grouped", "at_once"), [(False, None), (True, 5), (True, 2), (True, 1)], ids=str)
def test_quantised_weights_are_those_they_are_dequantised_to(
    base_format: str, grouped: bool, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once or in parts, of which one has no row, and one no row of its first expert."""
    draw.generator.manual_seed(0)
    monkeypatch.setattr(draw, "dtype", torch.float32)
    if at_once is not None:
        monkeypatch.setattr(quant_weight, "_STACK_AT_ONCE", at_once * 2 * BLOCK * BLOCK)
    tokens_TH, weights_TC, doutput_TH = draw(T, BLOCK), draw(T, C), draw(T, BLOCK, requires_grad=False)
    choices_TC = torch.tensor([[4, 1], [1, 4]] * 3 + [[1, 4]])  # none is the first one's, the third's or the fourth's
    weights = [draw(5, *size, requires_grad=False) for size in ((2 * BLOCK, BLOCK), (BLOCK, BLOCK))]
    factors = [(draw(5, 8, BLOCK), draw(5, size, 8)) for size in (2 * BLOCK, BLOCK)]
    quantized = [quantize(base_format, one, column_parallel=one is weights[0]) for one in weights]
    exact = [one.dequantize(torch.float32) for one in quantized]
    inputs, computed = [tokens_TH, weights_TC, *factors[0], *factors[1]], []
    for mix, given in ((partial(mix_experts, grouped=grouped), quantized), (mix_one_by_one, exact)):
        output_TH = mix(tokens_TH, weights_TC, choices_TC, *given, *factors)
        computed.append([output_TH.detach(), *torch.autograd.grad(output_TH, inputs, doutput_TH)])
    for actual, expected in zip(*computed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


def test_few_rows_leave_most_quantised_experts_as_they_are() -> None:
    draw.generator.manual_seed(0)
    native = draw(4, BLOCK, BLOCK, requires_grad=False)
    quantized, choices_R = quantize("fp8", native, column_parallel=True), torch.tensor([1, 1, 3])
    few = RowGroups.find(choices_R, quantized, quantized, grouped=True)
    assert (few.grouped, few.counts) == (False, [0, 2, 0, 1])
    enough = RowGroups.find(torch.tensor([1, 1, 3, 3]), quantized, quantized, grouped=True)
    assert (enough.grouped, enough.counts) == (True, None)
    assert RowGroups.find(choices_R, native, native, grouped=True).grouped


def test_no_input_gradient_is_computed_where_none_is_asked_for() -> None:
    """Below the lowest adapters, those of the second linears: three products of the factors, and no other."""
    draw.generator.manual_seed(0)
    tokens_TH, weights_TC = draw(T, H, requires_grad=False), draw(T, C, requires_grad=False)
    weights = draw(E, 2 * FEATURES, H, requires_grad=False), draw(E, H, FEATURES, requires_grad=False)
    second = draw(E, K, FEATURES), draw(E, H, K)
    output_TH = mix_experts(tokens_TH, weights_TC, torch.tensor([[0, 1]] * T), *weights, None, second)
    with count_flops() as counter:
        output_TH.sum().backward()
    assert counter.get_total_flops() == 2 * T * C * K * (H + H + FEATURES)
