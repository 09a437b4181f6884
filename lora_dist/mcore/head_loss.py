"""Output layer and cross-entropy in one: target tokens only, vocabulary split over TP, no logits kept.

Shapes: N target tokens, H hidden, V this rank's vocabulary rows (with padding), C tokens of one chunk.
"""

from typing import Any

import torch
import torch.distributed as dist

from lora_dist.fusion import Chain

_MAX_CHUNK_LOGITS = 2**25
"""Logits of one chunk, so that their fp32 form stays at 128 MiB whatever the batch."""


def compute_target_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    vocab_size: int,
    label_smoothing: float,
    tp_rank: int,
    group: dist.ProcessGroup | None,
    logits_divisor: float = 1.0,
) -> torch.Tensor:
    """Sum over the N tokens of the cross-entropy, fp32 scalar, equal on every TP rank; a label of -1 counts nothing.

    With smoothing e the loss of a token is (1 - e) (-log p_label) + e mean_v(-log p_v) over the true vocabulary.
    d(hidden) is this rank's summand: the caller's input must sum it over TP in backward.
    """
    scale = 1.0 / logits_divisor
    return _HeadLoss.apply(hidden_NH, weight_VH, labels_N, vocab_size, label_smoothing, tp_rank, group, scale)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients while the logits of a chunk are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        vocab_size: int,
        label_smoothing: float,
        tp_rank: int,
        group: dist.ProcessGroup | None,
        scale: float,
    ) -> torch.Tensor:
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        num_rows = weight_VH.shape[0]
        first_row = tp_rank * num_rows
        num_valid = min(max(vocab_size - first_row, 0), num_rows)
        total = torch.zeros((), dtype=_upcast(hidden_NH[:0]).dtype, device=hidden_NH.device)
        dhidden_NH = torch.empty_like(hidden_NH) if needs_dhidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=total.dtype) if needs_dweight else None
        chunk_size = _choose_chunk_size(hidden_NH.shape[0], num_rows)
        buffer_CV = weight_VH.new_empty(chunk_size, num_rows)
        for start in range(0, hidden_NH.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            hidden_CH = hidden_NH[rows]
            logits_CV = _upcast(_multiply(hidden_CH, weight_VH.t(), scale, buffer_CV[: hidden_CH.shape[0]]))
            logits_CV[:, num_valid:] = float("-inf")
            loss_C, dlogits_CV = _cross_entropy(
                logits_CV, labels_N[rows], (first_row, num_valid), vocab_size, label_smoothing, group
            )
            total += loss_C.sum()
            if dhidden_NH is not None:
                _multiply(dlogits_CV.to(weight_VH.dtype), weight_VH, scale, dhidden_NH[rows])
            if dweight_VH is not None:
                dweight_VH.add_(dlogits_CV.to(hidden_CH.dtype).t() @ hidden_CH, alpha=scale)
        ctx.save_for_backward(dhidden_NH, dweight_VH)
        ctx.weight_dtype = weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        dhidden_NH, dweight_VH = ctx.saved_tensors
        dhidden = None if dhidden_NH is None else dhidden_NH * dtotal.to(dhidden_NH.dtype)
        dweight = None if dweight_VH is None else (dweight_VH * dtotal).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None


def _multiply(left: torch.Tensor, right: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """`scale` left @ right over `out`, whose values count nothing; the product's kernel scales what it writes."""
    return out.addmm_(left, right, beta=0.0, alpha=scale)


def _choose_chunk_size(num_tokens: int, num_rows: int) -> int:
    """Chunks of nearly one size: a short last one would read all of the weight for a few tokens."""
    num_chunks = max(1, -(-num_tokens * num_rows // _MAX_CHUNK_LOGITS))
    return max(1, -(-num_tokens // num_chunks))  # a replica's last validation rows may have no target


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    local_rows: tuple[int, int],
    vocab_size: int,
    label_smoothing: float,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token and d(loss)/d(logits) of this rank's rows, written over the logits.

    `local_rows`: the first, and how many of them are no padding. Two small collectives a chunk: the maximum, then the
    sums of exponentials, label logits and logits.
    """
    max_C = _find_max(logits_CV)
    if group is not None:
        dist.all_reduce(max_C, op=dist.ReduceOp.MAX, group=group)
    first_row, num_valid = local_rows
    is_target_C, local_labels_C = labels_C >= 0, labels_C - first_row
    here_C = (local_labels_C >= 0) & (local_labels_C < num_valid)
    row_C = torch.where(here_C, local_labels_C, 0)
    label_logit_C = (logits_CV.gather(1, row_C[:, None])[:, 0] - max_C).masked_fill(~here_C, 0.0)
    exp_sum_C, logit_sum_C = _exponentiate(logits_CV, max_C, num_valid if label_smoothing else 0)
    sums_3C = torch.stack([exp_sum_C, label_logit_C, logit_sum_C])
    if group is not None:
        dist.all_reduce(sums_3C, group=group)
    exp_sum_C, label_logit_C, logit_sum_C = sums_3C
    loss_C = exp_sum_C.log() - (1.0 - label_smoothing) * label_logit_C - label_smoothing / vocab_size * logit_sum_C
    loss_C = loss_C.where(is_target_C, 0.0)
    probabilities_CV = logits_CV.div_(exp_sum_C.where(is_target_C, float("inf"))[:, None])
    if label_smoothing:
        probabilities_CV[:, :num_valid] -= (is_target_C.to(loss_C.dtype) * (label_smoothing / vocab_size))[:, None]
    probabilities_CV.scatter_add_(1, row_C[:, None], (here_C.to(loss_C.dtype) * (label_smoothing - 1.0))[:, None])
    return loss_C, probabilities_CV


@Chain
def _find_max(logits_CV: torch.Tensor) -> torch.Tensor:
    return logits_CV.amax(dim=-1)


@Chain
def _exponentiate(logits_CV: torch.Tensor, max_C: torch.Tensor, num_summed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - max) over the logits; its sum, and the sum of the first `num_summed` of logits - max."""
    logits_CV -= max_C[:, None]
    logit_sum_C = logits_CV[:, :num_summed].sum(-1)
    return logits_CV.exp_().sum(-1), logit_sum_C
