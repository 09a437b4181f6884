"""The norm that goes backward from its output against torch's own, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.mcore.norm import Norm
from lora_dist.measure.ledger import open_activation_ledger

S, B, H = 6, 3, 16


def build_norm(dtype: torch.dtype = torch.float64) -> Norm:
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=1, params_dtype=dtype)
    norm = Norm(config, H)
    norm.requires_grad_(False)
    norm.keeps_output = True
    torch.nn.init.uniform_(norm.weight, 0.3, 1.5)
    torch.nn.init.normal_(norm.bias, std=0.3)
    return norm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_gradient_equals_layer_norm(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = build_norm(dtype)
    x = (3 * torch.randn(S, B, H) + 1).to(dtype).requires_grad_()
    dy = torch.randn(S, B, H).to(dtype)
    expected = torch.autograd.grad(F.layer_norm(x, (H,), norm.weight, norm.bias), x, dy)[0]
    y = norm(x)
    assert "NormFromOutput" in type(y.grad_fn).__name__
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected, atol=tolerance, rtol=tolerance)


def test_keeps_nothing_beside_what_an_adapted_linear_keeps() -> None:
    norm = build_norm()
    x = torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(2, H, dtype=torch.float64, requires_grad=True)
    with open_activation_ledger(lambda: [*norm.parameters(), factor]) as ledger:
        z = norm(2 * x) @ factor.t()
    assert z.requires_grad
    assert ledger.peak_bytes == S * B * (H + 1) * 8  # the output and the deviations


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_trained_norms_go_through_torch(trained: str) -> None:
    norm = build_norm()
    norm.get_parameter(trained).requires_grad_(True)
    norm(torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert norm.get_parameter(trained).grad is not None


def test_a_weight_that_cannot_be_divided_by_goes_through_torch() -> None:
    norm = build_norm()
    with torch.no_grad():
        norm.weight[3] = 0.0
    x = torch.randn(S, B, H, dtype=torch.float64, requires_grad=True)
    norm(x).pow(2).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
