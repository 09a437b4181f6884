"""A quantised weight: its error, bytes, shards, and bitsandbytes' own layer beside it."""

import sys

import bitsandbytes
import pytest
import torch

from lora_dist.base_format import BLOCK, LinearShape, compute_weight_bytes
from lora_dist.lora.function import frozen_linear, lora_linear
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.quant import weight as quant_weight
from lora_dist.quant.weight import QuantizedWeight

FORMATS = ["nf4", "nf4_double", "fp8", "mxfp4"]
O, H = 512, 768  # noqa: E741


def draw_weight(out_features: int = O, in_features: int = H) -> torch.Tensor:
    """Normal, with rows and columns of very different size and one block of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight_OH = 0.02 * torch.randn(out_features, in_features, generator=generator)
    weight_OH *= 1 + torch.rand(out_features, 1, generator=generator) * 4
    weight_OH[3, BLOCK : 2 * BLOCK] = 0
    return weight_OH


def quantize(base_format: str, weight_OH: torch.Tensor, *, column_parallel: bool = True) -> QuantizedWeight:
    shape = LinearShape(
        out_features=weight_OH.shape[0], in_features=weight_OH.shape[1], column_parallel=column_parallel
    )
    quantized = QuantizedWeight(base_format, shape)
    quantized.fill(weight_OH)
    return quantized


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("base_format", ["nf4", "nf4_double"])
def test_nf4_is_as_near_as_its_levels(base_format: str, column_parallel: bool) -> None:
    weight_OH = draw_weight()
    back_OH = quantize(base_format, weight_OH, column_parallel=column_parallel).dequantize(torch.float32)
    widest_step = bitsandbytes.functional.get_4bit_type("nf4", device="cpu").diff().max()
    largest_OK = weight_OH.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    error_OK = (back_OH - weight_OH).unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    range_of_scales = largest_OK.max() - largest_OK.min() if base_format == "nf4_double" else 0.0
    assert (error_OK <= (widest_step / 2 + 1e-6) * largest_OK + range_of_scales / 510).all()
    assert (back_OH - weight_OH).norm() < 0.1 * weight_OH.norm()


def test_fp8_is_as_near_as_its_mantissa() -> None:
    weight_OH = draw_weight()
    back_OH = quantize("fp8", weight_OH).dequantize(torch.float32)
    scale_OH = (weight_OH.unflatten(-1, (-1, BLOCK)).abs().amax(-1) / 448).repeat_interleave(BLOCK, 1)
    # Half a unit of three mantissa bits; below 2^-6 half of the smallest value, 2^-9.
    assert ((back_OH - weight_OH).abs() <= weight_OH.abs() / 16 * 1.0001 + scale_OH * 2**-10).all()


@pytest.mark.parametrize("base_format", FORMATS)
def test_zeros_stay_zero(base_format: str) -> None:
    assert (quantize(base_format, torch.zeros(O, H)).dequantize(torch.float32) == 0).all()
    if base_format != "nf4_double":  # whose step takes in the other blocks
        assert (quantize(base_format, draw_weight()).dequantize(torch.float32)[3, BLOCK : 2 * BLOCK] == 0).all()


@pytest.mark.parametrize("base_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(base_format: str, dtype: torch.dtype) -> None:
    quantized = quantize(base_format, draw_weight())
    exact, rounded = quantized.dequantize(torch.float32), quantized.dequantize(dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("base_format", FORMATS)
@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_are_slices_bit_for_bit(base_format: str, column_parallel: bool, tp_size: int) -> None:
    weight_OH, dim = draw_weight(), 0 if column_parallel else 1
    parts = [
        quantize(base_format, part, column_parallel=column_parallel).dequantize(torch.float32)
        for part in weight_OH.chunk(tp_size, dim)
    ]
    whole = quantize(base_format, weight_OH, column_parallel=column_parallel).dequantize(torch.float32)
    assert torch.equal(torch.cat(parts, dim), whole)


def test_filling_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize("nf4_double", draw_weight()).dequantize(torch.float32)
    monkeypatch.setattr(quant_weight, "_ELEMENTS_AT_ONCE", 100 * H)
    assert torch.equal(quantize("nf4_double", draw_weight()).dequantize(torch.float32), whole)


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("base_format", FORMATS)
def test_a_stack_holds_what_each_expert_alone_would(base_format: str, column_parallel: bool) -> None:
    """nf4_double would have other groups of scales, over several experts, were 3 x 96 rows one weight's."""
    weights_EOH = draw_weight(3 * 96).view(3, 96, H)
    shape = LinearShape(out_features=96, in_features=H, column_parallel=column_parallel)
    alone = [quantize(base_format, weight_OH, column_parallel=column_parallel) for weight_OH in weights_EOH]
    at_once, one_by_one = (QuantizedWeight(base_format, shape, num_experts=3) for _ in range(2))
    at_once.fill(weights_EOH)
    for expert, weight_OH in enumerate(weights_EOH):
        one_by_one[expert].fill(weight_OH)
    for stack in (at_once, one_by_one):
        assert stack.nbytes == 3 * compute_weight_bytes(base_format, shape, 2)
        buffers = dict(stack.named_buffers())
        for expert, own in enumerate(alone):
            assert {name: buffer.shape for name, buffer in own.named_buffers()} == {
                name: buffer[expert].shape for name, buffer in buffers.items()
            }
            assert all(torch.equal(buffers[name][expert], buffer) for name, buffer in own.named_buffers())
        expected_EOH = torch.stack([own.dequantize(torch.bfloat16) for own in alone])
        assert torch.equal(stack.dequantize(torch.bfloat16), expected_EOH)
        assert torch.equal(stack[1:3].dequantize(torch.bfloat16), expected_EOH[1:])
        assert torch.equal(stack[2].dequantize(torch.bfloat16), expected_EOH[2])


@pytest.mark.parametrize(("most", "parts"), [(10, [10]), (9, [5, 5]), (4, [4, 4, 2]), (1, [1] * 10), (0.5, [1] * 10)])
def test_a_stack_is_dequantised_in_equal_parts(most: float, parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = QuantizedWeight("fp8", LinearShape(out_features=3, in_features=64, column_parallel=True), num_experts=10)
    monkeypatch.setattr(quant_weight, "_STACK_AT_ONCE", int(most * 3 * 64))
    starts = range(0, 10, stack.experts_at_once)
    assert [stack[start : start + stack.experts_at_once].shape[0] for start in starts] == parts
    assert stack.is_divided == (len(parts) > 1)


@pytest.mark.parametrize(
    ("base_format", "column_parallel", "bits"),
    [
        ("nf4", True, 4.5),
        ("fp8", True, 8.5),
        ("mxfp4", False, 4.25),
        ("nf4_double", True, 4 + 8 / 64 + 64 / (64 * 192)),
        ("nf4_double", False, 4 + 8 / 64 + 64 / (64 * 256)),
    ],
)
def test_bits_a_weight_of_gpt3(base_format: str, column_parallel: bool, bits: float) -> None:
    shape = LinearShape(out_features=12288, in_features=12288, column_parallel=column_parallel)
    quantized = QuantizedWeight(base_format, shape, device=torch.device("meta"))
    assert 8 * quantized.nbytes == bits * shape.num_elements
    assert quantized.nbytes == compute_weight_bytes(base_format, shape, 2)


@pytest.mark.parametrize("base_format", FORMATS)
def test_a_cast_of_the_model_leaves_it_alone(base_format: str) -> None:
    quantized = quantize(base_format, draw_weight())
    before = quantized.dequantize(torch.float32)
    assert torch.equal(torch.nn.Sequential(quantized).to(torch.bfloat16)[0].dequantize(torch.float32), before)


def test_blocks_must_not_cross_rows() -> None:
    with pytest.raises(
        ValueError,
        match=r"model.base_format=nf4 keeps one scale for 64 weights of a row, and the 96 inputs of a linear over tp 1",
    ):
        QuantizedWeight("nf4", LinearShape(out_features=8, in_features=96, column_parallel=True))


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    shape = LinearShape(out_features=8, in_features=64, column_parallel=True)
    with pytest.raises(ValueError, match=r"pip install 'bitsandbytes>=0.50'"):
        QuantizedWeight("nf4", shape)
    QuantizedWeight("fp8", shape)


@pytest.mark.parametrize(("base_format", "tolerance"), [("nf4", 1e-5), ("nf4_double", 5e-3)])
def test_against_bitsandbytes_own_layer(base_format: str, tolerance: float) -> None:
    """bitsandbytes rounds the scales of double quantisation differently: about as far off, but not to the same side."""
    weight_OH, x = draw_weight(), torch.randn(5, 2, H, generator=torch.Generator().manual_seed(1))
    double = base_format == "nf4_double"
    theirs = bitsandbytes.nn.Linear4bit(H, O, bias=False, quant_type="nf4", compress_statistics=double)
    theirs.weight = bitsandbytes.nn.Params4bit(
        weight_OH.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    theirs = theirs.to("cpu")
    expected, actual = theirs(x), frozen_linear(x, quantize(base_format, weight_OH), None)
    assert theirs.weight.quant_state is not None, "not quantised"
    assert (actual - expected).norm() <= tolerance * expected.norm()
    if double:
        codes, state = theirs.weight.data, theirs.weight.quant_state
        their_error = (bitsandbytes.functional.dequantize_4bit(codes, state) - weight_OH).norm()
        our_error = (quantize(base_format, weight_OH).dequantize(torch.float32) - weight_OH).norm()
        assert our_error <= 1.001 * their_error


@pytest.mark.parametrize("base_format", FORMATS)
def test_gradients_are_those_of_the_dequantised_weight_and_nothing_more_is_kept(base_format: str) -> None:
    quantized = quantize(base_format, draw_weight())
    weight_OH = quantized.dequantize(torch.float32)
    generator = torch.Generator().manual_seed(2)
    x, a, b, bias = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((5, 2, H), (3, H), (O, 3), (O,))
    )
    results = []
    for weight in (weight_OH, quantized):
        with open_activation_ledger(lambda: (weight_OH, x, a, b)) as ledger:
            y_SBO = lora_linear(x, weight, bias, a, b)
        gradients = torch.autograd.grad(y_SBO.square().sum(), (x, a, b, bias))
        results.append((y_SBO, *gradients, ledger.peak_bytes))
    assert results[0][-1] == results[1][-1] == 5 * 2 * 3 * 4  # z alone
    for ours, theirs in zip(results[1][:-1], results[0][:-1], strict=True):
        assert torch.equal(ours, theirs)


def test_without_an_adapter_the_input_is_not_kept() -> None:
    quantized, x = quantize("nf4", draw_weight()), torch.randn(5, 2, H, requires_grad=True)
    with open_activation_ledger() as ledger:
        y_SBO = frozen_linear(x, quantized, None)
    assert ledger.peak_bytes == 0
    y_SBO.sum().backward()
    torch.testing.assert_close(x.grad, quantized.dequantize(torch.float32).sum(0).expand_as(x))
