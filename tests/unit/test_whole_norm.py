"""The norm of all heads' queries and keys against torch's own, in one process: values, gradients, what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.config import ModelConfig
from lora_dist.mcore import whole_norm
from lora_dist.mcore.rotary import Angles, rotate
from lora_dist.mcore.whole_norm import WholeNorm
from lora_dist.measure.ledger import open_activation_ledger

S, B, D, NUM_HEADS, NUM_KV_HEADS = 6, 3, 8, 4, 2
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)]


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> WholeNorm:
    """In the dtype that the test names; its weights frozen and far from equal."""
    dtype = getattr(request, "param", torch.float64)
    monkeypatch.setattr(whole_norm, "allocate", lambda size, config: torch.empty(size, dtype=config.params_dtype))
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=NUM_HEADS, params_dtype=dtype)
    config.model = ModelConfig(
        **{"name": "toy", "family": "minimax_m2", "num_layers": 1, "hidden_size": 32, "num_heads": NUM_HEADS},
        **{"num_kv_heads": NUM_KV_HEADS, "head_size": D, "rotary_fraction": 0.5, "ffn_hidden_size": 8},
        **{"num_experts": 2, "experts_per_token": 1, "vocab_size": 9, "max_position_embeddings": S},
    )
    torch.manual_seed(0)
    made = WholeNorm(config).requires_grad_(False)
    for weight in made.parameters():
        torch.nn.init.uniform_(weight, 0.3, 3.0).mul_(torch.where(torch.arange(len(weight)) % 3 > 0, 1, -1))
    return made


def draw(dtype: torch.dtype, magnitude: float = 1.0) -> tuple[list[torch.Tensor], Angles, list[torch.Tensor]]:
    """Queries and keys, half of whose features are turned, and gradients for them."""
    shapes = [(S, B, heads, D) for heads in (NUM_HEADS, NUM_KV_HEADS)]
    inputs = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]
    angles_SB1F = 4 * torch.randn(S, B, 1, D // 4, dtype=torch.float64)
    angles = tuple((magnitude * one).to(dtype) for one in (angles_SB1F.cos(), angles_SB1F.sin()))
    return inputs, (angles[0], angles[1]), [torch.randn(shape).to(dtype) for shape in shapes]


def compute_expected(norm: WholeNorm, inputs: list[torch.Tensor], angles: Angles) -> list[torch.Tensor]:
    weights = norm.q_weight, norm.k_weight
    normed = [F.rms_norm(x.flatten(2), w.shape, w, 1e-5) for x, w in zip(inputs, weights, strict=True)]
    return [rotate(y.unflatten(2, (-1, D)), angles) for y in normed]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1.3])
@pytest.mark.parametrize(("norm", "tolerance"), TOLERANCES, indirect=["norm"], ids=str)
def test_gradients_equal_torchs(norm: WholeNorm, tolerance: float, magnitude: float, trained: bool) -> None:
    norm.requires_grad_(trained)
    inputs, angles, gradients = draw(norm.q_weight.dtype, magnitude)
    wanted = [*inputs, *norm.parameters()] if trained else inputs
    expected = compute_expected(norm, inputs, angles)
    outputs = norm(*inputs, angles)
    kept = outputs[0].grad_fn.saved_tensors[0]
    assert (kept.data_ptr() == outputs[0].data_ptr()) != trained
    for actual, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, value, atol=tolerance, rtol=tolerance)
    pairs = zip(*(torch.autograd.grad(each, wanted, gradients) for each in (outputs, expected)), strict=True)
    for actual, gradient in pairs:
        assert (actual - gradient).abs().max() <= tolerance * gradient.abs().max()


def test_keeps_two_factors_a_token_beside_what_attention_keeps(norm: WholeNorm) -> None:
    inputs, angles, _ = draw(torch.float64)
    with open_activation_ledger(lambda: [*norm.parameters(), *angles]) as ledger:
        query, key = norm(*(2 * x for x in inputs), angles)
        squares = query.square(), key.square()
    assert all(each.requires_grad for each in squares)
    assert ledger.peak_bytes == query.nbytes + key.nbytes + 2 * S * B * 8


@pytest.mark.parametrize("weight", [0.0, 1e-12])
def test_a_weight_that_cannot_be_divided_by_keeps_the_input(norm: WholeNorm, weight: float) -> None:
    """Nor one whose pair drowns it: in fp64 from 4.5e10 times its size on."""
    norm.q_weight[3] = weight
    inputs, angles, gradients = draw(torch.float64)
    outputs = norm(*inputs, angles)
    assert outputs[0].grad_fn.saved_tensors[0].data_ptr() == inputs[0].data_ptr()
    expected = torch.autograd.grad(compute_expected(norm, inputs, angles), inputs, gradients)
    for actual, gradient in zip(torch.autograd.grad(outputs, inputs, gradients), expected, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-12, rtol=1e-12)
