"""The small modules that the families' layers need: norms, gates, shared heads, rotation."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.cli.compose import compose_config
from lora_dist.mcore.attention import SdpaAttention
from lora_dist.mcore.gates import GeGlu, SwiGlu
from lora_dist.mcore.norm import RmsNorm, UnitRmsNorm
from lora_dist.mcore.rotary import rotate
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.plan.attention import PlannedAttention


def build_norm(dtype: torch.dtype) -> RmsNorm:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, params_dtype=dtype)
    norm = RmsNorm(config, 16)
    torch.nn.init.uniform_(norm.weight, 0.3, 1.5)
    return norm


@pytest.mark.parametrize("from_output", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_rms_norm_has_torchs_gradients(dtype: torch.dtype, tolerance: float, from_output: bool) -> None:
    torch.manual_seed(0)
    norm = build_norm(dtype)
    norm.requires_grad_(not from_output)
    norm.keeps_output = from_output
    x, dy = (3 * torch.randn(6, 3, 16) + 1).to(dtype).requires_grad_(), torch.randn(6, 3, 16).to(dtype)
    inputs = [x] if from_output else [x, norm.weight]
    expected = torch.autograd.grad(F.rms_norm(x, (16,), norm.weight, norm.eps), inputs, dy)
    y = norm(x)
    torch.testing.assert_close(y, F.rms_norm(x, (16,), norm.weight, norm.eps), atol=tolerance, rtol=tolerance)
    for actual, wanted in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("from_output", [False, True])
def test_a_unit_norms_weight_counts_from_one(from_output: bool) -> None:
    """bf16 knows no weight between 1 and 1.0078, but 0.001 and twice that."""
    norm = UnitRmsNorm(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1), 16).to(torch.bfloat16)
    assert not norm.weight.any()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 0.5, 16))
        norm.weight[:2] = torch.tensor([0.001, 0.002])
    norm.keeps_output = from_output
    norm.requires_grad_(not from_output)
    x, dy = torch.randn(6, 3, 16).requires_grad_(), torch.randn(6, 3, 16)
    factor = (1 + norm.weight.detach().float()).requires_grad_()
    expected = F.rms_norm(x, (16,), factor, norm.eps)
    torch.testing.assert_close(norm(x), expected)
    dx, dfactor = torch.autograd.grad(expected, [x, factor], dy)
    norm(x).backward(dy)
    torch.testing.assert_close(x.grad, dx)
    if not from_output:
        torch.testing.assert_close(norm.weight.grad, dfactor.bfloat16())


def test_a_weight_that_cannot_be_divided_by_keeps_the_input() -> None:
    norm = build_norm(torch.float64).requires_grad_(False)
    norm.keeps_output = True
    norm.weight[3] = 0.0
    x = torch.randn(6, 3, 16, dtype=torch.float64, requires_grad=True)
    norm(x).pow(2).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_the_gate_keeps_its_input_alone() -> None:
    x = torch.randn(6, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGlu(), x)
    assert torch.autograd.gradcheck(GeGlu(), x)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGlu()(x), F.silu(gate) * up)
    torch.testing.assert_close(GeGlu()(x), F.gelu(gate, approximate="tanh") * up)
    with open_activation_ledger() as ledger:
        kept = SwiGlu()(x)
    assert kept.requires_grad
    assert ledger.peak_bytes == x.nbytes


def attend(mask: torch.Tensor | None, **options: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The core's output for 4 query heads on 2 key heads, and what it keeps for backward."""
    generator, kept = torch.Generator().manual_seed(0), []
    shapes = [(6, 2, 4, 8), (6, 2, 2, 8), (6, 2, 2, 8)]
    query, key, value = (torch.randn(shape, generator=generator).to(**options).requires_grad_() for shape in shapes)
    core = SdpaAttention(TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = core(query, key, value, mask)
    return output, kept


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()], ids=["causal", "packed"])
def test_shared_heads_attend_alike_where_the_kernel_takes_them_and_where_it_does_not(
    mask: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, few = attend(mask)
    monkeypatch.setattr("lora_dist.mcore.attention.takes_shared_heads", lambda *_: False)
    written_out, many = attend(mask)
    torch.testing.assert_close(shared, written_out)
    sizes = [sum(tensor.numel() for tensor in kept if tensor.shape[-1] == 8) for kept in (few, many)]
    assert sizes[1] - sizes[0] == 2 * (4 - 2) * 6 * 2 * 8


@pytest.mark.parametrize(("hardware", "num_heads"), [("h100", 2), ("v100_32gb", 4), ("cpu", 2)])
def test_the_plan_keeps_the_heads_that_the_kernel_keeps(hardware: str, num_heads: int) -> None:
    config = compose_config([f"hardware={hardware}"]).hardware
    assert config is not None
    with PlannedAttention(config):
        _, kept = attend(None, device="meta", dtype=torch.float32 if hardware == "cpu" else torch.float16)
    assert [tuple(tensor.shape) for tensor in kept].count((2, num_heads, 6, 8)) >= 2


def test_rotation_keeps_the_angles_alone() -> None:
    angles = torch.randn(6, 3, 1, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, (cos, sin)), x)
    with open_activation_ledger() as ledger:
        turned = rotate(2 * x, (cos, sin))
    torch.testing.assert_close(turned.norm(), (2 * x).norm())
    assert ledger.peak_bytes == cos.nbytes + sin.nbytes
