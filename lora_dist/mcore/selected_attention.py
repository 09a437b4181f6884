"""The attention core over what an indexer has picked: torch's fused kernels, chunk by chunk of the queries.

A chunk looks at the positions up to its own last one, with a bias that is made of the choice's bits and, in backward,
made again: nothing of the size [S, S] is kept or ever there.

Shapes: B rows, A heads of this rank, S positions of queries, K of keys, Q queries of a chunk, D features of a head, V
of its value, W bytes of K bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.mcore.attention import LayerMasks, Mask, SdpaAttention
from lora_dist.mcore.indexer import QUERIES_AT_ONCE, Selected, unpack_bits
from lora_dist.mcore.kernels import as_bias, choose_kernel, fill_features
from lora_dist.mcore.window import Tiles


class SelectedAttention(SdpaAttention):
    """As its base where nothing is picked."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._selection: Iterator[torch.Tensor | None] | None = None
        """Of the parts that are still to attend."""

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        attention_mask: Mask | LayerMasks | Selected,
        **options: Any,
    ) -> torch.Tensor:
        if not isinstance(attention_mask, Selected):
            return super().forward(query_SBAD, key_SBAD, value_SBAV, attention_mask, **options)
        self._selection = iter(attention_mask.selection)
        try:
            return super().forward(query_SBAD, key_SBAD, value_SBAV, attention_mask.mask, **options)
        finally:
            self._selection = None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | Tiles | None,
        dropout: float,
    ) -> torch.Tensor:
        bits_BSW = None if self._selection is None else next(self._selection)
        if bits_BSW is None:
            return super()._attend(query, key, value, mask, dropout)
        assert dropout == 0.0, "the configuration refuses it"
        return attend_selected(query, key, value, bits_BSW, self.scale)


def attend_selected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits_BSW: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """[B, A, S, V] of queries [B, A, S, D], keys [B, A, K, D] and values [B, A, K, V], the queries those of the last S
    of K positions; bit k of a query says whether it attends to position k, and is 0 behind its own.
    """
    size, num_features = value.shape[-1], query.shape[-1]
    scale = num_features**-0.5 if scale is None else scale
    query, key, value = (fill_features(one, num_features) for one in (query, key, value))
    output: torch.Tensor = _SelectedAttention.apply(query, key, value, bits_BSW, scale)  # type: ignore[no-untyped-call]
    return output[..., :size]


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bits_BSW: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        B, A, S, D = query.shape
        output = query.new_empty(B, S, A, D).transpose(1, 2)
        kept: list[torch.Tensor] = []
        for chunk, end in _list_chunks(S, key.shape[2]):
            bias = _make_bias(bits_BSW[:, chunk], end, query.dtype)
            ctx.kernel = choose_kernel(query, bias)
            inputs = query[:, :, chunk], key[:, :, :end], value[:, :, :end]
            out, *rest = ctx.kernel.attend(*inputs, bias, False, scale)
            output[:, :, chunk] = out
            kept += rest
        ctx.save_for_backward(query, key, value, bits_BSW, output, *kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, bits_BSW, output, *kept = ctx.saved_tensors
        chunks = _list_chunks(query.shape[2], key.shape[2])
        num_kept = len(kept) // len(chunks)
        dquery = torch.empty_like(query)
        sums = tuple(torch.zeros_like(one, dtype=_find_sum_dtype(one)) for one in (key, value))
        for number, (chunk, end) in enumerate(chunks):
            lse, *rest = kept[number * num_kept : (number + 1) * num_kept]
            bias = _make_bias(bits_BSW[:, chunk], end, query.dtype)
            inputs = query[:, :, chunk], key[:, :, :end], value[:, :, :end]
            results = output[:, :, chunk], lse
            dquery[:, :, chunk], *dothers = ctx.kernel.differentiate(
                doutput[:, :, chunk], inputs, bias, False, results, rest, ctx.scale
            )
            for total, one in zip(sums, dothers, strict=True):
                total[:, :, :end] += one
        return dquery, sums[0].to(key.dtype), sums[1].to(value.dtype), None, None


def _list_chunks(num_queries: int, num_keys: int) -> list[tuple[slice, int]]:
    """Queries, and the end of the positions that they may look at."""
    starts = range(0, num_queries, QUERIES_AT_ONCE)
    chunks = [slice(start, min(start + QUERIES_AT_ONCE, num_queries)) for start in starts]
    return [(chunk, num_keys - num_queries + chunk.stop) for chunk in chunks]


def _find_sum_dtype(one: torch.Tensor) -> torch.dtype:
    """Of a gradient that every chunk adds to."""
    return torch.promote_types(one.dtype, torch.float32)


def _make_bias(bits_BQW: torch.Tensor, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, Q, K]: 0 where a query attends, else -inf."""
    return as_bias(unpack_bits(bits_BQW, num_keys)[:, None], dtype)
