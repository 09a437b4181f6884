"""The attention core: torch's fused kernels over whole rows, tile by tile where a layer sees a window, or example by
example where a row holds several.

Shapes: S sequence, B rows, A attention heads of this rank, D features of a head's query and key, V of its value: D, or
fewer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.batch import RowBlocks
from lora_dist.generation.cache import LayerCache
from lora_dist.mcore.context_attention import attend_over_processes
from lora_dist.mcore.direct_attention import attend_directly
from lora_dist.mcore.kernels import as_bias, write_out_heads
from lora_dist.mcore.layers import allocate
from lora_dist.mcore.row_group import RowGroup
from lora_dist.mcore.window import Tiles, compute_tiles, find_tile_size


@dataclass(frozen=True, slots=True)
class WindowedBlocks:
    """Of which some are longer than the window."""

    row_blocks: RowBlocks
    masks: Mapping[int, torch.Tensor | Tiles]
    """By those blocks' lengths."""


Mask = torch.Tensor | Tiles | RowBlocks | WindowedBlocks | None
"""Who looks at whom: [1 or B, 1, S, S], True where a query may look, or added to its scores; tiles of a window; blocks
that are causal within themselves; None for causal rows."""


@dataclass(frozen=True, slots=True)
class LayerMasks:
    """Of a model with layers of several kinds."""

    full: Mask
    """For the layers that see all before a position."""
    windowed: Mask
    """For those that see a sliding window."""
    recurrent: RowBlocks | torch.Tensor | None = None
    """For those without attention: the blocks, whatever the others have, None for whole rows; where the model runs step
    by step bool [B, S], False in the padding."""


class SdpaAttention(nn.Module):
    """Attention core through torch's fused kernels: no [S, S] tensor is kept, and V100 has the kernel too."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = config.softmax_scale
        self.sees_window = False
        self.sinks: nn.Parameter | None = None
        self.cache: LayerCache | None = None
        """Where the model runs step by step: what it has seen of each row."""
        self.row_group: RowGroup | None = None
        """Where rows are split over processes: those, and what this one has."""
        self.window: int | None = None
        """Of positions that one sees there, itself counted; None means all before it."""

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        attention_mask: Mask | LayerMasks,
        **_: Any,
    ) -> torch.Tensor:
        """[S, B, A * V].

        Keys and values may have fewer heads, a divisor of A. With a cache the mask has a column for everything kept,
        these S positions last.
        """
        dropout = self.dropout if self.training else 0.0
        if isinstance(attention_mask, LayerMasks):
            attention_mask = attention_mask.windowed if self.sees_window else attention_mask.full
        if self.row_group is not None:
            assert dropout == 0.0, "the configuration refuses it"
            assert attention_mask is None or isinstance(attention_mask, tuple), "the configuration refuses it"
            return attend_over_processes(
                query_SBAD, key_SBAD, value_SBAV, self.sinks, attention_mask, self.scale, self.window, self.row_group
            ).flatten(2)
        if dropout:
            with get_cuda_rng_tracker().fork():
                return self._compute(query_SBAD, key_SBAD, value_SBAV, attention_mask, dropout)
        return self._compute(query_SBAD, key_SBAD, value_SBAV, attention_mask, 0.0)

    def _compute(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        mask: Mask,
        dropout: float,
    ) -> torch.Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_SBAD, key_SBAD, value_SBAV))
        if isinstance(mask, tuple):
            mask = WindowedBlocks(mask, {})
        if isinstance(mask, WindowedBlocks):
            return _attend_in_blocks(query, key, value, mask, self._attend, dropout).flatten(2)
        if self.cache is not None:
            key, value = self.cache.append(key, value)
        out = self._attend(query, key, value, mask, dropout)
        # In a plain layout, or matmul would make one small product a position of the next linear's one large product.
        return out.permute(2, 0, 1, 3).flatten(0, 1).reshape(*query_SBAD.shape[:2], -1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | Tiles | None,
        dropout: float,
    ) -> torch.Tensor:
        if isinstance(mask, Tiles):
            assert dropout == 0.0, "whole rows have it"
            return attend_directly(query, key, value, None, mask, self.scale)
        return _attend_fused(query, key, value, mask, dropout, self.scale)


class SinkAttention(SdpaAttention):
    """The same with a sink for each head (`lora_dist.mcore.sinks`)."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        num_heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.sinks = nn.Parameter(allocate(num_heads, config=config))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | Tiles | None,
        dropout: float,
    ) -> torch.Tensor:
        assert dropout == 0.0, "the configuration refuses it"
        if isinstance(mask, torch.Tensor):
            mask = as_bias(mask, query.dtype)
        return attend_directly(query, key, value, self.sinks, mask, self.scale)


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: WindowedBlocks,
    attend: Callable[..., torch.Tensor],
    dropout: float,
) -> torch.Tensor:
    """[S, B, A, V] of [B, heads, S, D] and [B, heads, S, V]; scores of two positions in different blocks are never
    computed.
    """

    def attend_block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(query, key, value, blocks.masks.get(query.shape[2]), dropout).permute(2, 0, 1, 3)

    rows = []
    # Split, not indexed: its backward joins the parts' gradients, where that of an index fills up a tensor for each.
    for lengths, q, k, v in zip(blocks.row_blocks, query.split(1), key.split(1), value.split(1), strict=True):
        parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
        rows.append(torch.cat([attend_block(*part) for part in parts]))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    is_shared = key.shape[1] < query.shape[1]
    if is_shared and not takes_shared_heads(query, mask):
        key, value = write_out_heads(key, query), write_out_heads(value, query)
        is_shared = False
    value_size = value.shape[-1]
    if value_size < query.shape[-1]:  # most fused kernels take equal sizes alone
        value = F.pad(value, (0, query.shape[-1] - value_size))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=is_shared, scale=scale
    )
    return out[..., :value_size]


def takes_shared_heads(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the fused kernel takes fewer key heads than query heads: flash attention does, V100's does not.

    torch would take plain products instead, and keep all scores.
    """
    if query.device.type != "cuda":
        return True
    has_flash = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return has_flash and mask is None and query.dtype != torch.float32


def compute_attention_bias(
    block_ids_BS: torch.Tensor, dtype: torch.dtype, sliding_window: int | None = None
) -> torch.Tensor:
    """[B, 1, S, S] to add to the scores: 0 where a position may look, that is at or before itself within its own block
    (`number_blocks`) and its window, else -inf.

    Padding looks at itself, so that no row of the softmax is empty. One for all layers: of truth values, attention
    would make such a tensor in each layer, and keep it for backward.
    """
    S = block_ids_BS.shape[1]
    causal_SS = torch.ones(S, S, dtype=torch.bool, device=block_ids_BS.device).tril()
    if sliding_window is not None:
        causal_SS = causal_SS.triu(1 - sliding_window)
    same_BSS = block_ids_BS[:, :, None] == block_ids_BS[:, None, :]
    return as_bias((same_BSS & causal_SS)[:, None], dtype)


def compute_window_mask(
    block_ids_BS: torch.Tensor, dtype: torch.dtype, sliding_window: int, *, drops: bool = False
) -> torch.Tensor | Tiles:
    """For layers that see a window shorter than the rows: tiles where they are less work than a bias [B, 1, S, S].

    `drops`: attention has dropout, which whole rows draw.
    """
    size = None if drops else find_tile_size(sliding_window, block_ids_BS.shape[1])
    if size is None:
        return compute_attention_bias(block_ids_BS, dtype, sliding_window)
    return compute_tiles(block_ids_BS, dtype, sliding_window, size)


def compute_windowed_blocks(
    row_blocks: RowBlocks, dtype: torch.dtype, sliding_window: int, device: torch.device
) -> RowBlocks | WindowedBlocks:
    """For layers that see a window; blocks no longer than that see all of themselves."""
    lengths = {length for lengths in row_blocks for length in lengths if length > sliding_window}
    blocks = {length: torch.zeros(1, length, dtype=torch.int64, device=device) for length in lengths}
    masks = {length: compute_window_mask(block_ids, dtype, sliding_window) for length, block_ids in blocks.items()}
    return WindowedBlocks(row_blocks, masks) if masks else row_blocks
