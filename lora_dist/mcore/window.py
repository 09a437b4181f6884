"""Rows cut into tiles for layers that see a sliding window: a layer's scores, and the bias on them, grow with the row's
length times the window's, not with the square of the row's.

A tile's queries look at the keys of its own positions and of those before it that the window reaches. The tiles of all
rows lie side by side in one call of a fused kernel; the keys of several tiles are views of the same memory.

Shapes: B rows, S positions, W the window's, n tiles of T positions, the last filled up; K keys of a tile's queries: of
m tiles before it and its own; N = n or n B places of the kernel's batch dimension; D features of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_dist.mcore.kernels import as_bias

_TILES_A_WINDOW = 2
"""More are fewer scores, W + T a position, and more copies of the keys' gradients, (W + T) / T."""
_TILE_MULTIPLE = 8
"""Positions; what the kernels' biases are aligned to."""
_NO_BLOCK = -1


def find_tile_size(window: int, seq_len: int) -> int | None:
    """T; None where the scores of whole rows are not more than those of tiles."""
    size = _round_up(-(-window // _TILES_A_WINDOW), _TILE_MULTIPLE)
    num_keys = (1 + _count_tiles_before(window, size)) * size
    return size if _round_up(seq_len, size) * num_keys < seq_len**2 else None


def _count_tiles_before(window: int, size: int) -> int:
    return -(-(window - 1) // size)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel's tensors are cut from whole rows' and joined again."""

    num_rows: int
    seq_len: int
    size: int
    """T."""
    num_keys: int
    """K."""
    rows_are_alike: bool
    """They lie beside each other's heads, in memory as they are; else in the batch dimension."""

    def cut_queries(self, x_BASD: torch.Tensor) -> torch.Tensor:
        """[N, heads, T, D]: [n, B A, T, D] or [n B, A, T, D]; filled up with zeros."""
        return self._merge_rows(self._fill_up(x_BASD, num_before=0).unflatten(0, (-1, self.size)))

    def cut_keys(self, x_BASD: torch.Tensor) -> torch.Tensor:
        """[N, heads, K, D]; zeros before the first tile."""
        x_nBADK = self._fill_up(x_BASD, num_before=self.num_keys - self.size).unfold(0, self.num_keys, self.size)
        return self._merge_rows(x_nBADK.permute(0, 4, 1, 2, 3))

    def join_queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B, A, S, D] of [N, heads, T, D]; in memory the positions come first."""
        return self._cut_off(self._split_rows(x).permute(0, 3, 1, 2, 4))

    def sum_keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B, A, S, D] of [N, heads, K, D]: each position's sum over the tiles that see it, in fp32 at least."""
        x_nBAmTD = self._split_rows(x).unflatten(3, (-1, self.size))
        *before, own = x_nBAmTD.permute(3, 0, 4, 1, 2, 5)
        dtype = torch.promote_types(x.dtype, torch.float32)
        sum_nTBAD = own.to(dtype, memory_format=torch.contiguous_format)
        for distance, x_nTBAD in enumerate(reversed(before), 1):
            sum_nTBAD[:-distance] += x_nTBAD[distance:]
        return self._cut_off(sum_nTBAD)

    def _fill_up(self, x_BASD: torch.Tensor, *, num_before: int) -> torch.Tensor:
        """[S or more, B, A, D]."""
        x_SBAD = x_BASD.permute(2, 0, 1, 3)
        missing = num_before, -self.seq_len % self.size
        return F.pad(x_SBAD, (0, 0) * 3 + missing) if any(missing) else x_SBAD

    def _cut_off(self, x_nTBAD: torch.Tensor) -> torch.Tensor:
        """[B, A, S, D], its memory without what filled up the row."""
        x_SBAD = x_nTBAD.flatten(0, 1)
        if len(x_SBAD) > self.seq_len:
            x_SBAD = x_SBAD[: self.seq_len].clone(memory_format=torch.contiguous_format)
        return x_SBAD.permute(1, 2, 0, 3)

    def _merge_rows(self, x_nTBAD: torch.Tensor) -> torch.Tensor:
        """In memory a position's heads stay together, as the kernels have them."""
        merged = x_nTBAD.flatten(2, 3) if self.rows_are_alike else x_nTBAD.transpose(1, 2).flatten(0, 1)
        return merged.transpose(1, 2)

    def _split_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[n, B, A, T, D]."""
        return x.unflatten(1, (self.num_rows, -1)) if self.rows_are_alike else x.unflatten(0, (-1, self.num_rows))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Who looks at whom in rows that are cut into tiles."""

    bias: torch.Tensor
    """[N, 1, T, K] to add to the scores: n where it is the same for all rows, else n B, all rows of a tile together."""

    def describe(self, query_BASD: torch.Tensor) -> Tiling:
        (B, _, S, _), (N, _, T, K) = query_BASD.shape, self.bias.shape
        return Tiling(num_rows=B, seq_len=S, size=T, num_keys=K, rows_are_alike=N == -(-S // T))


def compute_tiles(block_ids_BS: torch.Tensor, dtype: torch.dtype, window: int, size: int) -> Tiles:
    """Of rows [B, S], or [1, S] for all alike: a position may look at or before itself within its own block and its
    window.

    What fills a row up looks at itself, so that no row of the softmax is empty.
    """
    num_before = _count_tiles_before(window, size) * size
    padding = num_before, -block_ids_BS.shape[1] % size
    key_ids_BnK = F.pad(block_ids_BS, padding, value=_NO_BLOCK).unfold(1, num_before + size, size)
    query_ids_BnT = key_ids_BnK[..., num_before:]
    numbers_K = torch.arange(num_before + size, device=block_ids_BS.device)
    distance_TK = numbers_K[num_before:, None] - numbers_K
    may_look_BnTK = (query_ids_BnT[..., None] == key_ids_BnK[..., None, :]) & (distance_TK >= 0)
    may_look_BnTK &= distance_TK < window
    return Tiles(as_bias(may_look_BnTK.transpose(0, 1).flatten(0, 1)[:, None], dtype))
