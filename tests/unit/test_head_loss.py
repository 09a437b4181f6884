"""The fused output layer and loss against torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from lora_dist.mcore import head_loss

N, H, V = 13, 8, 21


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_matches_cross_entropy(
    label_smoothing: float, chunk_tokens: int, divisor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "_MAX_CHUNK_LOGITS", chunk_tokens * 24)
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(24, H, dtype=torch.float64, requires_grad=True)  # three rows of padding
    labels = torch.randint(0, V, (N,))
    labels[2::4] = -1
    expected = F.cross_entropy(
        hidden @ weight[:V].t() / divisor, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=-1
    )
    expected_grads = torch.autograd.grad(2.5 * expected, (hidden, weight))
    actual = head_loss.compute_target_loss(
        hidden,
        weight,
        labels,
        vocab_size=V,
        label_smoothing=label_smoothing,
        tp_rank=0,
        group=None,
        logits_divisor=divisor,
    )
    actual_grads = torch.autograd.grad(2.5 * actual, (hidden, weight))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-12)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_no_weight_gradient_for_a_frozen_head() -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(24, H)
    head_loss.compute_target_loss(
        hidden, weight, torch.zeros(N, dtype=torch.long), vocab_size=V, label_smoothing=0.0, tp_rank=0, group=None
    ).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_rows_without_any_target() -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(24, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = head_loss.compute_target_loss(
        hidden.index_select(0, none), weight, none, vocab_size=V, label_smoothing=0.1, tp_rank=0, group=None
    )
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_no_target_token_is_no_loss() -> None:
    """As in a validation row that only fills up a replica's batch."""
    hidden, weight = torch.randn(0, H, requires_grad=True), torch.randn(24, H)
    loss = head_loss.compute_target_loss(
        hidden, weight, torch.zeros(0, dtype=torch.long), vocab_size=V, label_smoothing=0.1, tp_rank=0, group=None
    )
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
