"""Which examples share a row, and in which order an epoch visits them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_dist.lora.factors import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layout:
    """N examples in R rows; each example once, none split."""

    slot_examples: NDArray[np.int64]
    """[N]; the examples, row after row."""
    row_starts: NDArray[np.int64]
    """[R + 1]; row r holds slot_examples[row_starts[r] : row_starts[r + 1]]."""
    row_order: NDArray[np.int64]
    """[R]; the rows in the order of their visit."""

    @property
    def num_rows(self) -> int:
        return len(self.row_order)

    def get_row(self, visit: int) -> NDArray[np.int64]:
        """Examples of the row that comes at place `visit`."""
        row = self.row_order[visit]
        return self.slot_examples[self.row_starts[row] : self.row_starts[row + 1]]


def build_layout(lengths: NDArray[np.int64], *, seq_len: int, collate: str) -> Layout:
    """Rows of at most `seq_len` positions (`pack`), or of one example each in file order (`pad`)."""
    rows = _pack(lengths, seq_len) if collate == "pack" else [[example] for example in range(len(lengths))]
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return Layout(
        slot_examples=np.array([example for row in rows for example in row], dtype=np.int64),
        row_starts=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        row_order=np.arange(len(rows), dtype=np.int64),
    )


def shuffle_layout(layout: Layout, lengths: NDArray[np.int64], *, seed: int, epoch: int) -> Layout:
    """The epoch's order: rows shuffled, and examples of equal length exchanged among their places.

    An exchange keeps every row's length, so each epoch has the same number of rows and any step's place is a division,
    yet an example meets new neighbours in each epoch.
    """
    generator = np.random.default_rng(derive_seed(seed, "epoch", epoch))
    slot_lengths = lengths[layout.slot_examples]
    by_length = np.argsort(slot_lengths, kind="stable")
    by_length_shuffled = np.lexsort((generator.permutation(len(slot_lengths)), slot_lengths))
    slot_examples = np.empty_like(layout.slot_examples)
    slot_examples[by_length] = layout.slot_examples[by_length_shuffled]
    return Layout(
        slot_examples=slot_examples,
        row_starts=layout.row_starts,
        row_order=generator.permutation(layout.num_rows),
    )


def _pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best fit, longest example first: each goes to the row it leaves the least room in, or to a new one."""
    rows: list[list[int]] = []
    rows_with_room: Sequence[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n is set where a row has room for exactly n positions
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        if room > length:
            rows_with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows
