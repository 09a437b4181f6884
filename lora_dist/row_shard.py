"""Which positions of a row a context-parallel process has.

A row of S positions is cut into 2 x cp_size parts of C; a process has one from the front and the one that lies as far
from the end, so that causal attention costs all processes the same. Its positions are numbered through, part by part.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShard:
    """One process's parts; with cp_size 1 the whole row."""

    cp_size: int = 1
    cp_rank: int = 0

    def list_parts(self, seq_len: int) -> list[tuple[int, int]]:
        """Start and end of each part in a row of `seq_len` positions, which 2 x cp_size divides."""
        if self.cp_size == 1:
            return [(0, seq_len)]
        size, rest = divmod(seq_len, 2 * self.cp_size)
        assert rest == 0, f"cp {self.cp_size} cuts no row of {seq_len} positions"
        return [(number * size, (number + 1) * size) for number in self._part_numbers]

    def cut(self, whole_BS: torch.Tensor) -> torch.Tensor:
        """This process's columns of whole rows."""
        if self.cp_size == 1:
            return whole_BS
        return torch.cat([whole_BS[:, start:end] for start, end in self.list_parts(whole_BS.shape[1])], dim=1)

    def find_positions(self, first: int, num: int, num_here: int, device: torch.device) -> torch.Tensor:
        """int64 [num]; where this process's positions `first` and following of its `num_here` lie in the row."""
        here = torch.arange(first, first + num, device=device)
        if self.cp_size == 1:
            return here
        size = num_here // 2
        front, back = self._part_numbers
        return here + torch.where(here < size, front, back - 1) * size

    @property
    def _part_numbers(self) -> tuple[int, int]:
        return self.cp_rank, 2 * self.cp_size - 1 - self.cp_rank


WHOLE_ROW = RowShard()


def number_parts(cp_size: int) -> list[int]:
    """Which parts of the row those of all processes are, one process behind the other."""
    return [part for cp_rank in range(cp_size) for part in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def order_parts(cp_size: int) -> list[int]:
    """Where the row's parts lie, in its order, among those of all processes."""
    numbers = number_parts(cp_size)
    return [numbers.index(part) for part in range(2 * cp_size)]
