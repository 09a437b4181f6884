"""CUDA's attention kernels and grouped product for pretend GPUs: written plainly, with outputs laid out as torch's.

What the real ones refuse, or read wrongly without a word, is an AssertionError here. What they need on the way is on
the host, so that the device's memory holds what the real ones leave there.

Shapes: B rows, A heads, S positions of queries, K of keys, D features of a head.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MATH, _FLASH, _EFFICIENT = 0, 1, 2
_ALIGNMENT_BYTES = 16
Tensors = tuple[torch.Tensor, ...]
CALLS: Counter[str] = Counter()
_as_host: Callable[[torch.Tensor], torch.Tensor]


def install(as_host: Callable[[torch.Tensor], torch.Tensor]) -> torch.library.Library:
    """Gives the registrations, which end with it. `as_host` makes a tensor of the device one of the host, uncopied."""
    global _as_host
    _as_host = as_host
    kernels = {
        "_fused_sdp_choice": choose,
        "_scaled_dot_product_flash_attention": attend_flash,
        "_scaled_dot_product_flash_attention_backward": differentiate_flash,
        "_scaled_dot_product_efficient_attention": attend_efficient,
        "_scaled_dot_product_efficient_attention_backward": differentiate_efficient,
        "_grouped_mm": multiply_groups,
    }
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name, kernel in kernels.items():
        library.impl(name, kernel)
    return library


def choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """torch's order: flash attention, the memory-efficient kernel, plain products."""
    has_flash = torch.cuda.get_device_capability() >= (8, 0)
    same_size = query.shape[-1] == value.shape[-1] <= 256
    if has_flash and query.dtype in _HALF and attn_mask is None and same_size:
        return _FLASH
    if query.shape[1] == key.shape[1]:
        return _EFFICIENT
    CALLS["plain products"] += 1
    return _MATH


def attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    CALLS["flash"] += 1
    _check_flash(query, key, value)
    assert not is_causal or query.shape[2] == key.shape[2], "flash attention aligns the lower right corners"
    output, lse = _attend(query, key, value, None, is_causal, scale, dropout_p)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    nothing, no_mask = seed.new_empty(()), query.new_empty(0)
    return output, lse, None, None, query.shape[2], key.shape[2], seed, nothing, no_mask


def differentiate_flash(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> Tensors:
    CALLS["flash backward"] += 1
    _check_flash(query, key, value, out, grad_out)
    assert (logsumexp.shape, logsumexp.dtype) == (query.shape[:3], torch.float32)
    assert logsumexp.is_contiguous()
    assert (max_q, max_k, philox_seed.dtype, dropout_p) == (query.shape[2], key.shape[2], torch.uint64, 0.0)
    return _differentiate(grad_out, (query, key, value), None, out, logsumexp, is_causal, scale)


def attend_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensors:
    CALLS["efficient"] += 1
    _check_efficient(query, key, value, bias=attn_bias)
    output, lse = _attend(query, key, value, attn_bias, is_causal, scale, dropout_p)
    S, seed = query.shape[2], torch.zeros((), dtype=torch.int64, device=query.device)
    room = lse.new_full((*query.shape[:2], math.ceil(S / 32) * 32 if compute_log_sumexp else 0), math.inf)
    if compute_log_sumexp:
        room[..., :S] = lse
    return output, room, seed, seed.clone()


def differentiate_efficient(
    grad_out_: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    CALLS["efficient backward"] += 1
    bias = attn_bias if attn_bias is not None and attn_bias.numel() else None
    _check_efficient(query, key, value, grad_out_, bias=bias)
    assert out.transpose(1, 2).is_contiguous(), (
        f"the output is read as [B, S, A, D], whatever its strides {out.stride()}"
    )
    assert (logsumexp.shape[-1], logsumexp.dtype) == (math.ceil(query.shape[2] / 32) * 32, torch.float32)
    assert (dropout_p, grad_input_mask[3]) == (0.0, False), "neither is asked for"
    return *_differentiate(grad_out_, (query, key, value), bias, out, logsumexp, is_causal, scale), None


def _check_flash(*tensors: torch.Tensor) -> None:
    assert torch.cuda.get_device_capability() >= (8, 0), "FlashAttention only supports Ampere GPUs or newer"
    assert {one.dtype for one in tensors} in ({torch.float16}, {torch.bfloat16}), "flash attention has half types only"
    assert {one.shape[-1] for one in tensors} <= {*range(8, 257, 8)}, "head sizes are multiples of 8, at most 256"
    _check_layout(tensors)


def _check_efficient(*tensors: torch.Tensor, bias: torch.Tensor | None) -> None:
    query, key = tensors[:2]
    assert {one.shape[1] for one in tensors} == {query.shape[1]}, "the memory-efficient kernel has no shared heads"
    assert query.dtype != torch.bfloat16 or torch.cuda.get_device_capability() >= (8, 0), "no bf16 before Ampere"
    _check_layout(tensors)
    if bias is not None:
        assert (bias.shape, bias.dtype) == ((*query.shape[:3], key.shape[2]), query.dtype)
        assert bias.stride(-2) % 8 == 0 or bias.shape[-2] == 1, f"rows of the bias are not aligned: {bias.stride()}"


def _check_layout(tensors: tuple[torch.Tensor, ...]) -> None:
    for one in tensors:
        assert one.stride(-1) == 1, f"a head's features do not lie one behind the other: {one.stride()}"
        steps = [one.storage_offset(), *(step for step, size in zip(one.stride(), one.shape, strict=True) if size > 1)]
        assert all(step * one.itemsize % _ALIGNMENT_BYTES == 0 for step in steps[:-1]), f"not aligned: {steps}"


def _check_groups(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> None:
    CALLS["grouped"] += 1
    assert torch.cuda.get_device_capability() >= (8, 0)
    assert (a.dtype, b.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (offs.dtype, offs.device.type) == (torch.int32, "cuda")
    for one in (a, b):
        step = max(one.stride()[-2:])
        assert 1 in one.stride()[-2:], one.stride()
        assert step * one.itemsize % _ALIGNMENT_BYTES == 0, f"not aligned: {one.stride()}"


def _score(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, is_causal: bool, scale: float
) -> torch.Tensor:
    scores = query.float() @ key.float().mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if not is_causal:
        return scores
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)


def multiply_groups(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: None = None, out_dtype: None = None
) -> torch.Tensor:
    _check_groups(a, b, offs)
    return _aten._grouped_mm(*map(_as_host, (a, b, offs))).to(a.device)


def _repeat(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _put(x_BASD: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """On the device, laid out as the kernels do: [B, S, A, D] in memory."""
    B, A, S, D = x_BASD.shape
    return torch.empty(B, S, A, D, dtype=like.dtype, device=like.device).transpose(1, 2).copy_(x_BASD)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    device_query = query
    query, key, value = map(_as_host, (query, key, value))
    bias = None if bias is None else _as_host(bias)
    scores = _score(query, _repeat(key, query), bias, is_causal, scale or query.shape[-1] ** -0.5)
    lse = scores.logsumexp(-1)
    shares = F.dropout((scores - lse[..., None]).exp().nan_to_num(0.0), dropout_p)
    return _put(shares @ _repeat(value, query).float(), device_query), lse.to(device_query.device)


def _differentiate(
    doutput: torch.Tensor,
    inputs: Tensors,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> Tensors:
    """From the output and the logarithm of the sum that it is given, as the kernels do."""
    query, doutput, output, lse = map(_as_host, (inputs[0], doutput, output, lse))
    key, value = (_repeat(_as_host(one), query).float() for one in inputs[1:])
    scale, doutput = scale or query.shape[-1] ** -0.5, doutput.float()
    scores = _score(query, key, None if bias is None else _as_host(bias), is_causal, scale)
    shares = (scores - lse[..., : query.shape[2], None]).exp().nan_to_num(0.0)
    dscores = shares * (doutput @ value.mT - (doutput * output.float()).sum(-1, keepdim=True)) * scale
    grads = dscores @ key, dscores.mT @ query.float(), shares.mT @ doutput
    folded = (
        grad.unflatten(1, (one.shape[1], -1)).sum(2) if grad.shape[1] != one.shape[1] else grad
        for grad, one in zip(grads, inputs, strict=True)
    )
    return tuple(_put(grad, one) for grad, one in zip(folded, inputs, strict=True))
