"""What a position attends to in rows longer than `attended_positions`: the best ones by an indexer's scores (DeepSeek
Sparse Attention, arXiv:2512.02556, section 2.1), of its layer or of an earlier one (arXiv:2603.12201).

Every TP rank holds the indexer whole and picks for each tp_size-th query, so that all have as much to do; what they
have picked is gathered. A choice is kept as a bit for each position, S / 8 bytes a query: up to 32 times
`attended_positions` positions that is less than the places of the picked ones, and backward need not pick again.

Shapes: S positions that run, B rows, H hidden, L the latent of queries, I heads of the indexer, D features of one, Q
queries of a chunk, K positions that may be looked at, C picked ones, W bytes of K bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.base_shapes import compute_indexer_shapes
from lora_dist.config import ModelConfig
from lora_dist.generation.cache import LayerCache
from lora_dist.mcore.attention import LayerMasks, Mask
from lora_dist.mcore.rotary import Angles, turn

QUERIES_AT_ONCE = 1024
"""Of a chunk, whose scores [Q, K] and bias are the largest tensors here."""
_SCORES_AT_ONCE = 2**27
"""Elements of [heads, Q, K]: as many heads together as these allow."""
_NORM_EPSILON = 1e-6

Selection = tuple[torch.Tensor | None, ...]
"""Of each part of a microbatch that attends within itself, whole rows together or each block of each row: uint8
[B, S, W], or None where a position attends to all before it."""


@dataclass(slots=True)
class Selecting:
    """In the place of an attention mask where indexers may have something to pick: the mask, and of the microbatch that
    it belongs to what layers above are to attend to as well, and a recomputed layer again.
    """

    mask: Mask | LayerMasks
    keeps_all: bool
    """For layers that run again; else a choice is kept up to the next one."""
    picked: dict[int, Selection] = field(default_factory=dict)
    """By the layer whose indexer it is."""

    def keep(self, layer: int, selection: Selection) -> None:
        if not self.keeps_all:
            self.picked.clear()
        self.picked[layer] = selection


@dataclass(frozen=True, slots=True)
class Selected:
    """As `SelectedAttention` takes it."""

    mask: Mask | LayerMasks
    selection: Selection


class Indexer(nn.Module):
    """Frozen, in the run's dtype, whole on every TP rank: of buffers, which no method and no ZeRO stage touches."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    head_weight: torch.Tensor

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.model: ModelConfig = config.model
        self.cache: LayerCache | None = None
        """Where the model runs step by step: the keys of each row, and no values."""
        self.tp_rank, self.tp_size = ps.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
        for name, shape in compute_indexer_shapes(config.model).items():
            is_wide = name == "head_weight" and config.params_dtype == torch.float16  # as transformers has it
            dtype = torch.float32 if is_wide else config.params_dtype
            self.register_buffer(name, torch.empty(*shape, dtype=dtype, device=device), persistent=False)

    @torch.no_grad()
    def pick(
        self, hidden_SBH: torch.Tensor, q_latent_SBL: torch.Tensor, angles: Angles, mask: Mask | LayerMasks
    ) -> Selection:
        """`hidden_SBH` is this rank's part under sequence parallelism, the latent and the angles are of the whole
        sequence; `mask` as `SdpaAttention` takes it.
        """
        mask = mask.full if isinstance(mask, LayerMasks) else mask
        lengths = [length for row in mask for length in row] if isinstance(mask, tuple) else [len(q_latent_SBL)]
        if self.cache is None and not any(map(self.model.selects, lengths)):
            return (None,) * len(lengths)
        keys_SBD, weights_SBI = self._make_keys(hidden_SBH, angles)
        if isinstance(mask, tuple):
            return tuple(
                self._pick(q_latent_SBL[part], weights_SBI[part], keys_SBD[part], _cut(angles, part), None)
                for part in _list_parts(mask)
            )
        if self.cache is not None:
            keys_BAKD = keys_SBD.permute(1, 0, 2)[:, None]
            keys_SBD = self.cache.append(keys_BAKD, keys_BAKD[..., :0])[0][:, 0].transpose(0, 1)
        return (self._pick(q_latent_SBL, weights_SBI, keys_SBD, angles, mask),)

    def _make_keys(self, hidden_SBH: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the whole sequence: keys [S, B, D], and what each head's scores count [S, B, I]."""
        keys = F.linear(hidden_SBH, self.key_weight)
        keys = F.layer_norm(keys, keys.shape[-1:], self.norm_weight, self.norm_bias, _NORM_EPSILON)
        weights = F.linear(hidden_SBH.to(self.head_weight.dtype), self.head_weight)
        if self.config.sequence_parallel:
            group = ps.get_tensor_model_parallel_group()
            keys, weights = (gather_from_sequence_parallel_region(one, group=group) for one in (keys, weights))
        return self._turn(keys[:, :, None], angles)[:, :, 0], weights

    def _turn(self, x_SBID: torch.Tensor, angles: Angles) -> torch.Tensor:
        """The first features of each head; which half of them is where does not show in products."""
        if self.model.architecture.interleaved_indexer:
            turned, rest = x_SBID.tensor_split([self.model.rotary_size], dim=-1)
            x_SBID = torch.cat([turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rest], dim=-1)
        return turn(x_SBID, *angles)

    def _pick(
        self,
        q_latent_SBL: torch.Tensor,
        weights_SBI: torch.Tensor,
        keys_KBD: torch.Tensor,
        angles: Angles,
        mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """What the S last of K positions attend to."""
        num_queries, num_keys = len(q_latent_SBL), len(keys_KBD)
        if not self.model.selects(num_keys):
            return None
        first, step = (self.tp_rank, self.tp_size) if num_queries >= self.tp_size else (0, 1)
        places_S = torch.arange(num_keys - num_queries, num_keys, device=keys_KBD.device)
        keys_BDK = keys_KBD.permute(1, 2, 0).to(torch.promote_types(keys_KBD.dtype, torch.float32))
        bits = []
        for start in range(first, num_queries, step * QUERIES_AT_ONCE):
            chunk = slice(start, min(start + step * QUERIES_AT_ONCE, num_queries), step)
            allowed_BQK = _find_allowed(mask, places_S[chunk], chunk, num_keys)
            num_visible = num_keys - num_queries + chunk.stop
            if self.model.selects(num_visible):
                queries_QBID = self._make_queries(q_latent_SBL[chunk], _cut(angles, (chunk,)))
                scores_BQK = self._score(queries_QBID, weights_SBI[chunk], keys_BDK, num_visible)
                allowed_BQK = self._leave_best(scores_BQK, allowed_BQK)
            bits.append(pack_bits(allowed_BQK).expand(keys_BDK.shape[0], -1, -1))
        return self._gather(torch.cat(bits, dim=1), num_queries) if step > 1 else torch.cat(bits, dim=1)

    def _make_queries(self, q_latent_QBL: torch.Tensor, angles: Angles) -> torch.Tensor:
        queries = F.linear(q_latent_QBL, self.query_weight)
        return self._turn(queries.unflatten(-1, (-1, self.key_weight.shape[0])), angles)

    def _score(
        self, queries_QBID: torch.Tensor, weights_QBI: torch.Tensor, keys_BDK: torch.Tensor, num_visible: int
    ) -> torch.Tensor:
        """[B, Q, K], in fp32 at least: of the first `num_visible` positions the heads' products, those below zero left
        out, weighted and summed; -inf for the others.
        """
        queries_BQID = queries_QBID.transpose(0, 1).to(keys_BDK.dtype)
        B, Q, heads, size = queries_BQID.shape
        weights_BQI = weights_QBI.transpose(0, 1).to(keys_BDK.dtype) * (heads * size) ** -0.5
        scores_BQK = keys_BDK.new_full((B, Q, keys_BDK.shape[2]), float("-inf"))
        visible_BDK, summed = keys_BDK[..., :num_visible], None
        at_once = max(1, _SCORES_AT_ONCE // (B * Q * num_visible))
        for queries, weights in zip(queries_BQID.split(at_once, 2), weights_BQI.split(at_once, 2), strict=True):
            products = (queries.flatten(1, 2) @ visible_BDK).relu_().view(B * Q, -1, num_visible)
            of_heads = torch.bmm(weights.reshape(B * Q, 1, -1), products)[:, 0].view(B, Q, num_visible)
            summed = of_heads if summed is None else summed.add_(of_heads)
        scores_BQK[..., :num_visible] = summed
        return scores_BQK

    def _leave_best(self, scores_BQK: torch.Tensor, allowed_BQK: torch.Tensor) -> torch.Tensor:
        """Over all K positions, so that of equal scores those are taken that transformers takes."""
        scores_BQK = scores_BQK.masked_fill_(~allowed_BQK, float("-inf"))
        best_BQC = scores_BQK.topk(self.model.attended_positions or 0, dim=-1, sorted=False).indices
        return torch.zeros_like(scores_BQK, dtype=torch.bool).scatter_(-1, best_BQC, True) & allowed_BQK

    def _gather(self, bits_BQW: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Each rank's queries to their places."""
        most = -(-num_queries // self.tp_size)
        mine = F.pad(bits_BQW, (0, 0, 0, most - bits_BQW.shape[1])).contiguous()
        gathered = mine.new_empty(self.tp_size * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine, group=ps.get_tensor_model_parallel_group())
        by_rank = gathered.unflatten(0, (self.tp_size, -1))
        return by_rank.permute(1, 2, 0, 3).flatten(1, 2)[:, :num_queries]


def _list_parts(row_blocks: tuple[tuple[int, ...], ...]) -> Iterator[tuple[slice, slice]]:
    """Of [S, B, ...] each block of each row."""
    for row, lengths in enumerate(row_blocks):
        start = 0
        for length in lengths:
            yield slice(start, start + length), slice(row, row + 1)
            start += length


def _cut(angles: Angles, part: Any) -> Angles:
    return angles[0][part], angles[1][part]


def _find_allowed(mask: torch.Tensor | None, places_Q: torch.Tensor, chunk: slice, num_keys: int) -> torch.Tensor:
    """bool [B or 1, Q, K], True where a query may look at all."""
    if mask is None:
        return (torch.arange(num_keys, device=places_Q.device) <= places_Q[:, None])[None]
    own_BQK = mask[:, 0, chunk]
    return own_BQK if own_BQK.dtype == torch.bool else own_BQK == 0


def pack_bits(bools_BQK: torch.Tensor) -> torch.Tensor:
    """uint8 [B, Q, W], W bytes of eight each, the last filled up with zeros."""
    padded = F.pad(bools_BQK.to(torch.uint8), (0, -bools_BQK.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=padded.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits_BQW: torch.Tensor, num_keys: int) -> torch.Tensor:
    """bool [B, Q, K] of the first K bits."""
    bits_BQW = bits_BQW[..., : -(-num_keys // 8)]
    shifted = bits_BQW[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits_BQW.device)
    return (shifted & 1).flatten(-2)[..., :num_keys].bool()
