"""The gated delta rule in chunks (arXiv:2412.06464, section 3; its ungated form: arXiv:2406.06484, section 3): pure.

A head's state S [K, V] maps keys to values. Position t forgets a share of it and corrects what it has for its key:
S' = exp(g) S + k b (v - exp(g) k S), and reads o = q S' / sqrt(K). A chunk of C positions does that in a few products:
what its positions write solves a triangular system of its own, but for one product with the state before it.

Sequences of any length are cut into chunks, the first ones of all sequences before the second ones; longer sequences
come first, so that those with a chunk of a number are the first of those with one before.

Shapes: N chunks of all sequences, P sequences of a step, C positions of a chunk, G key heads, R value heads that share
one, K features of a key, V of a value, S positions, B rows, X any features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lora_dist.batch import RowBlocks

CHUNK_SIZE = 64
"""Positions; shorter rows are one chunk."""
_NORM_EPSILON = 1e-6
"""Added to the square of a query's or a key's length."""


def choose_chunk_size(num_positions: int) -> int:
    """Of rows of so many."""
    return min(CHUNK_SIZE, num_positions)


def count_chunks(num_positions: int, chunk_size: int) -> int:
    """Of one sequence; the last one may be filled up."""
    return -(-num_positions // chunk_size)


def count_active(num_rows: int, num_positions: int, row_blocks: RowBlocks | None) -> list[int]:
    """P of each step: how many sequences have a first, a second ... chunk. Without blocks each row is one sequence."""
    chunk_size = choose_chunk_size(num_positions)
    lengths = [n for blocks in row_blocks for n in blocks] if row_blocks is not None else [num_positions] * num_rows
    counts = [count_chunks(length, chunk_size) for length in lengths]
    return [sum(count > step for count in counts) for step in range(max(counts))]


def cut_into_chunks(x_SBX: torch.Tensor, row_blocks: RowBlocks | None) -> torch.Tensor:
    """[N, C, X], zeros after the end of a sequence."""
    num_positions, num_rows, num_features = x_SBX.shape
    chunk_size = choose_chunk_size(num_positions)
    if row_blocks is None:
        padded = F.pad(x_SBX, (0, 0, 0, 0, 0, -num_positions % chunk_size))
        return padded.view(-1, chunk_size, num_rows, num_features).transpose(1, 2).flatten(0, 1)
    rows = (row_SX.split(blocks) for row_SX, blocks in zip(x_SBX.unbind(1), row_blocks, strict=True))
    sequences = [
        F.pad(one, (0, 0, 0, -len(one) % chunk_size)).view(-1, chunk_size, num_features).unbind()
        for row in rows
        for one in row
    ]
    return torch.stack([sequences[index][step] for step, index in _order_chunks(row_blocks, chunk_size)])


def join_chunks(x_NCX: torch.Tensor, num_rows: int, num_positions: int, row_blocks: RowBlocks | None) -> torch.Tensor:
    """[S, B, X]; the inverse of `cut_into_chunks`."""
    chunk_size, num_features = x_NCX.shape[1:]
    if row_blocks is None:
        whole = x_NCX.view(-1, num_rows, chunk_size, num_features).transpose(1, 2).flatten(0, 1)
        return whole[:num_positions]
    sequences: list[list[torch.Tensor]] = [[] for blocks in row_blocks for _ in blocks]
    for chunk, (_, index) in zip(x_NCX.unbind(), _order_chunks(row_blocks, chunk_size), strict=True):
        sequences[index].append(chunk)
    wholes = iter(sequences)
    rows = [torch.cat([torch.cat(next(wholes))[:length] for length in blocks]) for blocks in row_blocks]
    return torch.stack(rows, dim=1)


def _order_chunks(row_blocks: RowBlocks, chunk_size: int) -> list[tuple[int, int]]:
    """Step and sequence of each of the N chunks."""
    counts = [count_chunks(length, chunk_size) for blocks in row_blocks for length in blocks]
    by_length = sorted(range(len(counts)), key=lambda index: -counts[index])
    return [(step, index) for step in range(max(counts)) for index in by_length if counts[index] > step]


def convolve(
    x_NCX: torch.Tensor, kernels_XJ: torch.Tensor, active: Sequence[int], tails_PJX: torch.Tensor | None
) -> torch.Tensor:
    """[N, C, X]; each feature's weighted sum over a position and the J - 1 before it in its sequence, the last weight
    its own.

    `tails_PJX` are the J - 1 positions before the sequences; None for zeros.
    """
    num_before = kernels_XJ.shape[1] - 1
    if tails_PJX is None:
        tails_PJX = x_NCX.new_zeros(active[0], num_before, x_NCX.shape[2])
    befores, before = [], tails_PJX
    for step, chunks in enumerate(x_NCX.split(list(active))):
        befores.append(before)
        if step + 1 < len(active):
            joined = torch.cat([before, chunks], dim=1)
            before = joined[: active[step + 1], joined.shape[1] - num_before :]
    extended = torch.cat([torch.cat(befores), x_NCX], dim=1)
    size = x_NCX.shape[1]
    out = extended[:, :size] * kernels_XJ[:, 0]
    for place in range(1, num_before + 1):
        out = out + extended[:, place : place + size] * kernels_XJ[:, place]
    return out


def normalise(x: torch.Tensor) -> torch.Tensor:
    """To length one along the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt()


def apply_delta_rule(
    query_NGCK: torch.Tensor,
    key_NGCK: torch.Tensor,
    value_NGRCV: torch.Tensor,
    log_decay_NGRC: torch.Tensor,
    strength_NGRC: torch.Tensor,
    active: Sequence[int],
    *,
    state_PGRKV: torch.Tensor | None = None,
    keeps_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What each position reads [N, G, R, C, V], and where it is kept the state [P, G, R, K, V] after the last step.

    Queries and keys are normalised; g, the `log_decay`, is not positive; b is the `strength`. `state_PGRKV` is that
    before the sequences, None for zeros. Differentiable, and exact to rounding whatever g is: no decay is divided by.
    """
    from_start_NGRC1, decay_NGRCC = log_decay_NGRC.cumsum(-1).exp()[..., None], _compute_decays(log_decay_NGRC)
    query_NGCK = query_NGCK * query_NGCK.shape[-1] ** -0.5
    key_NG1CK, query_NG1CK = key_NGCK[:, :, None], query_NGCK[:, :, None]
    scores_NGRCC = (query_NGCK @ key_NGCK.mT)[:, :, None] * decay_NGRCC
    overlaps_NGRCC = (key_NGCK @ key_NGCK.mT)[:, :, None] * decay_NGRCC * strength_NGRC[..., None]
    right = torch.cat([value_NGRCV, key_NG1CK * from_start_NGRC1], dim=-1) * strength_NGRC[..., None]
    solved = torch.linalg.solve_triangular(overlaps_NGRCC, right, upper=False, unitriangular=True)
    own_NGRCV, reading_NGRCK = solved.split([value_NGRCV.shape[-1], key_NGCK.shape[-1]], dim=-1)
    written_NGRCV, before, state_PGRKV = _write(
        own_NGRCV,
        reading_NGRCK,
        key_NG1CK * decay_NGRCC[..., -1, :, None],
        from_start_NGRC1[..., -1:, :],
        active,
        state_PGRKV,
        keeps_state=keeps_state,
    )
    read_NGRCV = scores_NGRCC @ written_NGRCV
    if before is None:
        return read_NGRCV, state_PGRKV
    first, later = read_NGRCV.split([len(read_NGRCV) - len(before), len(before)])
    from_before = (query_NG1CK * from_start_NGRC1)[len(first) :] @ before
    return torch.cat([first, later + from_before]), state_PGRKV


def _write(
    own_NGRCV: torch.Tensor,
    reading_NGRCK: torch.Tensor,
    key_NGRCK: torch.Tensor,
    decay_NGR11: torch.Tensor,
    active: Sequence[int],
    state_PGRKV: torch.Tensor | None,
    *,
    keeps_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What each position writes, step by step; the states before those chunks that have one, which are the last of all;
    and the last state. What no chunk reads is not computed.

    `own` is what a position would write if the state were empty, `reading` what it corrects that by, `key` and `decay`
    what is left of both at the chunk's end.
    """
    written, before, state = [], list[torch.Tensor](), state_PGRKV
    steps = zip(*(x.split(list(active)) for x in (own_NGRCV, reading_NGRCK, key_NGRCK, decay_NGR11)), strict=True)
    for step, (own, reading, key, decay) in enumerate(steps):
        if state is not None:
            before.append(state)
            own = own - reading @ state
        written.append(own)
        num_next = active[step + 1] if step + 1 < len(active) else len(own) * keeps_state
        if num_next == 0:
            break
        key, decay, own = (x if len(x) == num_next else x[:num_next] for x in (key, decay, own))
        added = key.mT @ own
        state = added if state is None else added + state[:num_next] * decay
    return torch.cat(written), torch.cat(before) if before else None, state if keeps_state else None


def _compute_decays(log_decay_NGRC: torch.Tensor) -> torch.Tensor:
    """[N, G, R, C, C]; what is left at a position of what an earlier one, or itself, wrote: 0 for later ones.

    Each logarithm is a sum of its own. As a difference of two sums from the chunk's start, as it is often computed, it
    would be that of two large numbers where a head has forgotten much before.
    """
    size = log_decay_NGRC.shape[-1]
    is_earlier = torch.ones(size, size, dtype=torch.bool, device=log_decay_NGRC.device).tril(-1)
    since = log_decay_NGRC[..., :, None].expand(*log_decay_NGRC.shape, size).masked_fill(~is_earlier, 0).cumsum(-2)
    return since.masked_fill(is_earlier.t(), float("-inf")).exp()
