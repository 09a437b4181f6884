"""Attention over picked positions alone, chunk by chunk, against plain products with a mask; and its bits."""

import pytest
import torch

from lora_dist.mcore import selected_attention
from lora_dist.mcore.indexer import pack_bits, unpack_bits
from lora_dist.mcore.selected_attention import attend_selected


def pick_few(num_rows: int, num_queries: int, num_keys: int, num_picked: int) -> torch.Tensor:
    """bool [B, S, K]: so many at or before each query, where there are as many."""
    generator = torch.Generator().manual_seed(0)
    scores_BSK = torch.rand(num_rows, num_queries, num_keys, generator=generator)
    allowed_SK = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    scores_BSK = scores_BSK.masked_fill(~allowed_SK, -1.0)
    picked_BSK = torch.zeros_like(scores_BSK, dtype=torch.bool).scatter_(2, scores_BSK.topk(num_picked).indices, True)
    return picked_BSK & allowed_SK


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, picked_BSK: torch.Tensor
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~picked_BSK[:, None], float("-inf")).softmax(-1) @ value


def draw(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("num_keys", [21, 30], ids=["whole", "continued"])
@pytest.mark.parametrize("chunk", [7, 8, 100])
def test_output_and_gradients_are_those_of_plain_products(
    num_keys: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selected_attention, "QUERIES_AT_ONCE", chunk)
    inputs = draw((2, 3, 21, 10), (2, 3, num_keys, 10), (2, 3, num_keys, 6), dtype=torch.float64)
    picked_BSK = pick_few(2, 21, num_keys, 5)
    expected, actual = attend_plainly(*inputs, picked_BSK), attend_selected(*inputs, pack_bits(picked_BSK), None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, gradient in zip(torch.autograd.grad((actual * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(one, gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hundreds_of_positions_that_nothing_looks_at_do_no_harm(dtype: torch.dtype) -> None:
    """Kernels go through the keys in blocks, of which some have only scores of -inf."""
    inputs = draw((1, 2, 1500, 16), (1, 2, 1500, 16), (1, 2, 1500, 16), dtype=dtype)
    picked_BSK = pick_few(1, 1500, 1500, 4)
    picked_BSK[:, 900:, :700] = False
    picked_BSK[:, 900:, 800] = True
    expected, actual = attend_plainly(*inputs, picked_BSK), attend_selected(*inputs, pack_bits(picked_BSK), None)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    for one in torch.autograd.grad(actual.float().square().sum(), inputs):
        assert one.isfinite().all()


@pytest.mark.parametrize("num_keys", [1, 8, 13])
def test_bits_come_back(num_keys: int) -> None:
    bools_BQK = torch.rand(2, 3, num_keys, generator=torch.Generator().manual_seed(0)) > 0.5
    bits_BQW = pack_bits(bools_BQK)
    assert bits_BQW.shape == (2, 3, -(-num_keys // 8))
    assert torch.equal(unpack_bits(bits_BQW, num_keys), bools_BQK)
    assert torch.equal(unpack_bits(bits_BQW, 1), bools_BQK[..., :1])
