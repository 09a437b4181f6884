"""The attention kernel that a GPU would choose, where there is none: it decides what is saved for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lora_dist.config import HardwareConfig

_aten = torch.ops.aten
_FLASH_CAPABILITY = 8.0
_MASK_ALIGNMENT = 8
"""Elements; the memory-efficient kernel wants each row of a mask to begin at a multiple of so many."""


class GpuAttention(TorchFunctionMode):
    """Replaces scaled_dot_product_attention by flash attention (8.0 and above, 16 bits, no mask) or the efficient one.

    The choice is that of torch's `sdp_utils.cpp`; cuDNN's kernel, which Hopper may take instead of flash attention,
    saves the same.
    """

    def __init__(self, hardware: HardwareConfig) -> None:
        super().__init__()
        self._has_flash = hardware.compute_capability >= _FLASH_CAPABILITY

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        dropout_p: float,
    ) -> torch.Tensor:
        if self._has_flash and attn_mask is None and query.dtype != torch.float32:
            return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]  # type: ignore[no-any-return]
        bias = None if attn_mask is None else _build_bias(attn_mask, query)
        needs_lse = torch.is_grad_enabled() and query.requires_grad
        out = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, needs_lse, dropout_p, is_causal)
        return out[0]  # type: ignore[no-any-return]


def _build_bias(mask_B1SS: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The additive mask that torch makes of a boolean one in each call, expanded over the heads."""
    bias = torch.zeros_like(mask_B1SS, dtype=query.dtype).masked_fill_(mask_B1SS.logical_not(), float("-inf"))
    if (S := bias.shape[-1]) % _MASK_ALIGNMENT:
        bias = F.pad(bias, (0, -S % _MASK_ALIGNMENT))[..., :S]
    return bias.expand(query.shape[0], query.shape[1], -1, -1)
