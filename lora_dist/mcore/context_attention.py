"""Attention of a process's parts of each row to all that lies before them, where a row is split over processes.

Keys and values of the whole row are gathered, used and dropped again; backward gathers them once more and scatters the
sums of their gradients. A part attends to what lies before it and causally within itself: two calls of a kernel without
a mask, whose outputs o are joined by the logarithms L of their sums of exponentials, as if one softmax had been taken
over both. Handed the joined o and L, the kernels' backward gives each call's share of the exact gradients. Within a
sliding window as many queries as it has positions attend in one call, under a mask, to no keys but those in reach.

Shapes: B rows, S positions of a row, P those of this process, A heads, D features of a key, V of a value, E of both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from lora_dist.batch import RowBlocks
from lora_dist.fusion import Chain
from lora_dist.mcore.kernels import AttentionKernel, as_bias, choose_kernel, fill_features, write_out_heads
from lora_dist.mcore.row_group import RowGroup
from lora_dist.mcore.sinks import compute_sink_grad, join_sinks
from lora_dist.row_shard import RowShard


def attend_over_processes(
    query_PBAD: torch.Tensor,
    key_PBAD: torch.Tensor,
    value_PBAV: torch.Tensor,
    sinks_A: torch.Tensor | None,
    row_blocks: RowBlocks | None,
    scale: float | None,
    window: int | None,
    row_group: RowGroup,
) -> torch.Tensor:
    """[P, B, A, V]. Keys and values may have fewer heads than queries; `row_blocks` are whole rows', None means that
    each row is one block; within a block a position sees so many as `window` says, itself counted. One collective
    forward, two backward.
    """
    P, B, _, num_features = query_PBAD.shape
    seq_len = P * row_group.shard.cp_size
    longest = seq_len if row_blocks is None else max(map(max, row_blocks))
    window = None if window is None or window >= longest else window
    spans = _list_spans(row_blocks, B, seq_len, row_group.shard, window)
    work = _Work(
        spans=spans,
        kernel=choose_kernel(query_PBAD, spans[0].build_bias(slice(0, 0), query_PBAD)),
        num_features=num_features,
        scale=num_features**-0.5 if scale is None else scale,
        row_group=row_group,
    )
    output: torch.Tensor = _ContextAttention.apply(query_PBAD, key_PBAD, value_PBAV, sinks_A, work)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Queries of some rows that lie one behind the other, and see the keys from `first_key` on up to themselves."""

    rows: slice
    queries: slice
    """Among this process's positions."""
    first_key: int
    first_query: int
    """In the row, as `first_key`."""
    window: int | None

    @property
    def end(self) -> int:
        return self.first_query + self.queries.stop - self.queries.start

    def list_calls(self) -> list[tuple[slice, bool]]:
        """Keys of each call of a kernel, and whether it is causal by itself."""
        if self.window is not None:
            return [(slice(max(self.first_key, self.first_query - self.window + 1), self.end), False)]
        calls = [(slice(self.first_query, self.end), True), (slice(self.first_key, self.first_query), False)]
        return calls if self.first_key < self.first_query else calls[:1]

    def build_bias(self, positions: slice, query: torch.Tensor) -> torch.Tensor | None:
        """To add to the scores of the queries with the keys at `positions`, where the window says which they see."""
        if self.window is None:
            return None
        query_S1 = torch.arange(self.first_query, self.end, device=query.device)[:, None]
        distance_SK = query_S1 - torch.arange(positions.start, positions.stop, device=query.device)
        return as_bias(((distance_SK >= 0) & (distance_SK < self.window))[None, None], query.dtype)


def _list_spans(
    row_blocks: RowBlocks | None, num_rows: int, seq_len: int, shard: RowShard, window: int | None
) -> list[_Span]:
    """Every block's meeting with every part, cut where it is longer than the window."""
    if row_blocks is None or len(set(row_blocks)) == 1:
        lengths = (seq_len,) if row_blocks is None else row_blocks[0]
        return list(_meet(slice(0, num_rows), lengths, seq_len, shard, window))
    of_rows = ((slice(row, row + 1), lengths) for row, lengths in enumerate(row_blocks))
    return [span for rows, lengths in of_rows for span in _meet(rows, lengths, seq_len, shard, window)]


def _meet(rows: slice, lengths: Sequence[int], seq_len: int, shard: RowShard, window: int | None) -> Iterator[_Span]:
    shift = 0  # from a position in the row to its number here
    for start, end in shard.list_parts(seq_len):
        shift -= start
        for block_end, length in zip(accumulate(lengths), lengths, strict=True):
            last = min(end, block_end)
            for first in range(max(start, block_end - length), last, window or seq_len):
                queries = slice(shift + first, shift + min(last, first + (window or seq_len)))
                first_key = block_end - length
                yield _Span(rows=rows, queries=queries, first_key=first_key, first_query=first, window=window)
        shift += end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What a process does for its parts of the rows, forward and backward."""

    spans: list[_Span]
    kernel: AttentionKernel
    num_features: int
    """D."""
    scale: float
    row_group: RowGroup

    def gather(self, key_PBAD: torch.Tensor, value_PBAV: torch.Tensor) -> torch.Tensor:
        """[S, B, A, E]: keys and values of whole rows side by side."""
        return self.row_group.gather(torch.cat([key_PBAD, value_PBAV], dim=-1))

    def attend(
        self, query_PBAD: torch.Tensor, pairs_SBAE: torch.Tensor, span: _Span
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Output [B, A, P, D] and L of the span's queries, and what else the kernel's backward wants."""
        query = self.lay_out(query_PBAD, span.queries, span.rows)
        results = []
        for positions, causal in span.list_calls():
            key, value = self._read_pairs(pairs_SBAE, positions, span.rows, query)
            bias = span.build_bias(positions, query)
            results.append(self.kernel.attend(query, key, value, bias, causal, self.scale))
        (output, lse, *rest), *others = results
        for other_output, other_lse, *_ in others:
            output, lse = _join(output, lse, other_output, other_lse)
        return output, lse, rest

    def differentiate(
        self,
        doutput: torch.Tensor,
        results: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        pairs_SBAE: torch.Tensor,
        dpairs_SBAE: torch.Tensor,
        span: _Span,
        rest: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The gradient of the span's queries; those of keys and values are added to `dpairs_SBAE`."""
        dquery = torch.zeros_like(query)
        for positions, causal in span.list_calls():
            inputs = query, *self._read_pairs(pairs_SBAE, positions, span.rows, query)
            bias = span.build_bias(positions, query)
            part, *dpairs = self.kernel.differentiate(doutput, inputs, bias, causal, results, rest, self.scale)
            dquery += part
            self._add_pairs(dpairs_SBAE[positions, span.rows], *dpairs)
        return dquery

    def lay_out(self, whole_SBAF: torch.Tensor, positions: slice, rows: slice) -> torch.Tensor:
        """[B, A, S, F] of some positions and rows, with as many features as the kernel wants for D."""
        return fill_features(whole_SBAF[positions, rows].permute(1, 2, 0, 3), self.num_features)

    def _read_pairs(
        self, pairs_SBAE: torch.Tensor, positions: slice, rows: slice, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the kernel takes them: most want as many features of both."""
        keys_SBAD, values_SBAV = pairs_SBAE.tensor_split([self.num_features], dim=-1)
        key, value = (self.lay_out(one, positions, rows) for one in (keys_SBAD, values_SBAV))
        if self.kernel.takes_shared_heads or key.shape[1] == query.shape[1]:
            return key, value
        return write_out_heads(key, query), write_out_heads(value, query)

    def _add_pairs(self, dpairs_SBAE: torch.Tensor, dkey: torch.Tensor, dvalue: torch.Tensor) -> None:
        """Add the gradients of what `_read_pairs` gave, where it came from."""
        num_heads = dpairs_SBAE.shape[2]
        parts = dpairs_SBAE.tensor_split([self.num_features], dim=-1)
        for part, gradient in zip(parts, (dkey, dvalue), strict=True):
            if gradient.shape[1] > num_heads:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                gradient = gradient.unflatten(1, (num_heads, -1)).sum(2, dtype=wide).to(gradient.dtype)
            part += gradient.permute(2, 0, 1, 3)[..., : part.shape[-1]]


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_PBAD: torch.Tensor,
        key_PBAD: torch.Tensor,
        value_PBAV: torch.Tensor,
        sinks_A: torch.Tensor | None,
        work: _Work,
    ) -> torch.Tensor:
        pairs_SBAE = work.gather(key_PBAD, value_PBAV)
        output_PBAV = query_PBAD.new_empty(*query_PBAD.shape[:-1], value_PBAV.shape[-1])
        lses: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for span in work.spans:
            out, lse, rest = work.attend(query_PBAD, pairs_SBAE, span)
            lses.append(lse if sinks_A is None else join_sinks(out, lse, sinks_A))
            output_PBAV[span.queries, span.rows] = out.permute(2, 0, 1, 3)[..., : output_PBAV.shape[-1]]
        # A kernel wants back what it drew dropout with. Here that is nothing: what one call returned does for all.
        ctx.save_for_backward(query_PBAD, key_PBAD, value_PBAV, output_PBAV, sinks_A, *lses, *rest)
        ctx.work = work
        return output_PBAV

    @staticmethod
    def backward(ctx: Any, doutput_PBAV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query_PBAD, key_PBAD, value_PBAV, output_PBAV, sinks_A, *saved = ctx.saved_tensors
        work: _Work = ctx.work
        lses, rest = saved[: len(work.spans)], saved[len(work.spans) :]
        pairs_SBAE = work.gather(key_PBAD, value_PBAV)
        dquery_PBAD, dpairs_SBAE = torch.empty_like(query_PBAD), torch.zeros_like(pairs_SBAE)
        dsinks_A = torch.zeros_like(sinks_A, dtype=lses[0].dtype) if ctx.needs_input_grad[3] else None
        for span, lse in zip(work.spans, lses, strict=True):
            query, doutput, output = (
                work.lay_out(whole, span.queries, span.rows) for whole in (query_PBAD, doutput_PBAV, output_PBAV)
            )
            if dsinks_A is not None:
                dsinks_A += compute_sink_grad(doutput, output, lse, sinks_A.to(lse.dtype))
            dquery = work.differentiate(doutput, (output, lse), query, pairs_SBAE, dpairs_SBAE, span, rest)
            dquery_PBAD[span.queries, span.rows] = dquery.permute(2, 0, 1, 3)[..., : work.num_features]
        dpairs_PBAE = work.row_group.scatter_sums(dpairs_SBAE)
        dkey_PBAD, dvalue_PBAV = dpairs_PBAE.tensor_split([work.num_features], dim=-1)
        dsinks_A = None if dsinks_A is None else dsinks_A.to(sinks_A.dtype)
        return dquery_PBAD, dkey_PBAD, dvalue_PBAV, dsinks_A, None


@Chain
def _join(
    output_BAPD: torch.Tensor, lse: torch.Tensor, other_BAPD: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of both, rounded once. The memory-efficient kernel fills L up with +inf, which stays
    so.
    """
    other_share = (other_lse - lse)[..., : output_BAPD.shape[2]].sigmoid()[..., None]
    joined = torch.lerp(output_BAPD.to(lse.dtype), other_BAPD.to(lse.dtype), other_share)
    return joined.to(output_BAPD.dtype), torch.logaddexp(lse, other_lse)
