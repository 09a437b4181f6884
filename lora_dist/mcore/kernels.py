"""torch's fused attention kernels called directly, forward and backward: what autograd's own functions keep and return
leaves no room for sinks, or for rows that are laid out otherwise.

Shapes: B rows, A heads of this rank, S positions of queries, K of keys, D features of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import wrap_torch_function

_aten = torch.ops.aten
_BIAS_ALIGNMENT = 8
"""Elements; the memory-efficient kernel takes rows that begin at multiples of so many, and copies others."""
_FEATURE_MULTIPLE = 8
"""Of a head's features, which the memory-efficient kernel takes."""
Tensors = tuple[torch.Tensor, ...]
Bias = torch.Tensor | None
"""[1 or B, 1, S, K] to add to the scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """One of them. Queries are [B, A, S, D], keys and values [B, heads, K, D]; `causal` rows begin together; `scale`
    None means D^-0.5.
    """

    takes_shared_heads: bool
    """Fewer heads of keys and values than of queries."""
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias, bool, float | None], tuple[Any, ...]]
    """Of query, key, value, bias, causal, scale: the output o [B, A, S, D], the logarithm of the sum of the scores'
    exponentials, L [B, A, S or more], and what else its backward wants."""
    run_backward: Callable[..., Tensors]
    """What `differentiate` calls."""

    def differentiate(
        self,
        doutput: torch.Tensor,
        inputs: Tensors,
        bias: Bias,
        causal: bool,
        results: Tensors,
        rest: Sequence[torch.Tensor],
        scale: float | None,
    ) -> Tensors:
        """The gradients of the `inputs` query, key and value; `results` are o and L, `rest` what else `attend` gave."""
        if doutput.stride(-1) != 1:  # which the kernels do not take
            doutput = doutput.contiguous()
        return self.run_backward(doutput, inputs, bias, causal, results, rest, scale)


def _attend_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, causal: bool, scale: float | None
) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )


def _differentiate_cpu(
    doutput: torch.Tensor,
    inputs: Tensors,
    bias: Bias,
    causal: bool,
    results: Tensors,
    _rest: Any,
    scale: float | None,
) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        doutput, *inputs, *results, 0.0, causal, attn_mask=bias, scale=scale
    )


def _attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, causal: bool, scale: float | None
) -> Any:
    assert bias is None, "flash attention has no bias"
    out, lse, _, _, _, _, *seed_and_offset, _ = _aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, scale=scale
    )
    return out, lse, *seed_and_offset


def _differentiate_flash(
    doutput: torch.Tensor,
    inputs: Tensors,
    _bias: Bias,
    causal: bool,
    results: Tensors,
    rest: Any,
    scale: float | None,
) -> Any:
    lengths = inputs[0].shape[2], inputs[1].shape[2]
    return _aten._scaled_dot_product_flash_attention_backward(
        doutput, *inputs, *results, None, None, *lengths, 0.0, causal, *rest, scale=scale
    )


def _attend_efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, causal: bool, scale: float | None
) -> Any:
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, _write_out_bias(bias, query), True, 0.0, causal, scale=scale
    )


def _differentiate_efficient(
    doutput: torch.Tensor,
    inputs: Tensors,
    bias: Bias,
    causal: bool,
    results: Tensors,
    rest: Any,
    scale: float | None,
) -> Any:
    wanted = [True, True, True, False]
    bias_BASK, (output, lse) = _write_out_bias(bias, inputs[0]), results
    # The kernel takes for given that the output's positions lie one behind the other, and reads no stride of theirs.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return _aten._scaled_dot_product_efficient_attention_backward(
        doutput, *inputs, bias_BASK, output, lse, *rest, 0.0, wanted, causal, scale=scale
    )[:3]


def _write_out_bias(bias: Bias, query: torch.Tensor) -> Bias:
    return None if bias is None else bias.expand(*query.shape[:2], -1, -1)


ON_CPU = AttentionKernel(takes_shared_heads=True, attend=_attend_cpu, run_backward=_differentiate_cpu)
FLASH = AttentionKernel(takes_shared_heads=True, attend=_attend_flash, run_backward=_differentiate_flash)
EFFICIENT = AttentionKernel(takes_shared_heads=False, attend=_attend_efficient, run_backward=_differentiate_efficient)


@wrap_torch_function(lambda query, _bias: (query,))
def choose_kernel(query: torch.Tensor, bias: Bias) -> AttentionKernel:
    """As torch chooses for scaled_dot_product_attention. A plan, whose tensors are on no device, overrides it."""
    if query.device.type != "cuda":
        return ON_CPU
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return FLASH if has_flash and bias is None and query.dtype != torch.float32 else EFFICIENT


def write_out_heads(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, heads, S, D] copied for each of the query's heads."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def fill_features(x: torch.Tensor, num_features: int) -> torch.Tensor:
    """With zeros, up to the multiple that the kernels take."""
    missing = -(-num_features // _FEATURE_MULTIPLE) * _FEATURE_MULTIPLE - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def as_bias(mask_B1SK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a position may look, else -inf; what is a bias already stays."""
    if mask_B1SK.dtype != torch.bool:
        return mask_B1SK
    *sizes, K = mask_B1SK.shape
    room = torch.zeros(*sizes, -(-K // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT, dtype=dtype, device=mask_B1SK.device)
    return room[..., :K].masked_fill_(~mask_B1SK, float("-inf"))
