"""The attention kernel that the planned hardware would choose: it decides what is saved for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lora_dist.config import HardwareConfig
from lora_dist.mcore.kernels import EFFICIENT, FLASH, ON_CPU, AttentionKernel, choose_kernel, write_out_heads

_aten = torch.ops.aten
_FLASH_CAPABILITY = 8.0


class PlannedAttention(TorchFunctionMode):
    """Replaces scaled_dot_product_attention by the kernel behind it, which fake tensors do not say, and chooses those
    that are called directly.

    On a GPU flash attention (8.0 and above, 16 bits, no mask) or the memory-efficient one, which wants keys for every
    query head; cuDNN's, which Hopper may take instead of flash attention, saves the same. On a CPU its flash attention,
    or plain products with dropout. The choice is that of torch's `sdp_utils`.
    """

    def __init__(self, hardware: HardwareConfig) -> None:
        super().__init__()
        self._on_cpu = hardware.kind == "cpu"
        self._has_flash = hardware.compute_capability >= _FLASH_CAPABILITY

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is choose_kernel:
            return self._choose_direct(*args)
        if func is not F.scaled_dot_product_attention or (self._on_cpu and kwargs["dropout_p"] > 0):
            return func(*args, **kwargs)
        return (_attend_on_cpu if self._on_cpu else self._attend_on_gpu)(*args, **kwargs)

    def _choose_direct(self, query: torch.Tensor, bias: torch.Tensor | None) -> AttentionKernel:
        if self._on_cpu:
            return ON_CPU
        return FLASH if self._takes_flash(query, bias) else EFFICIENT

    def _takes_flash(self, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
        return self._has_flash and mask is None and query.dtype != torch.float32

    def _attend_on_gpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        dropout_p: float,
        enable_gqa: bool,
        scale: float | None,
    ) -> torch.Tensor:
        if self._takes_flash(query, attn_mask):
            return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
        if enable_gqa:
            key, value = write_out_heads(key, query), write_out_heads(value, query)
        bias = None if attn_mask is None else attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
        needs_lse = torch.is_grad_enabled() and query.requires_grad
        out = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_lse, dropout_p, is_causal, scale=scale
        )
        return out[0]  # type: ignore[no-any-return]


def _attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
    enable_gqa: bool,
    scale: float | None,
) -> torch.Tensor:
    out = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]
