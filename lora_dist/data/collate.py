"""Rows of examples -> the tensors of one microbatch. Shapes: B rows, S positions."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_dist.batch import Batch
from lora_dist.data.examples import Examples
from lora_dist.prefix.slots import split_slots


def collate_rows(
    examples: Examples,
    rows: Sequence[NDArray[np.int64]],
    *,
    seq_len: int,
    packed: bool,
    row_ids: Sequence[int],
    num_loss_tokens: int,
    num_tokens: int,
) -> Batch:
    """Lay each row's examples one behind the other; what is left of a row, or an empty row, is padding.

    The label of a position is the next token of the same example. Labels are kept where they are learnt: in a pair from
    the target's first token, predicted at the separator or the slot before it, to its end token.
    """
    shape = (len(rows), seq_len)
    input_ids, labels, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    loss_mask = np.zeros(shape, dtype=np.bool_)
    for row, members in enumerate(rows):
        first = 0
        for example in members:
            here = slice(examples.starts[example], examples.starts[example + 1])
            tokens, learnt = examples.tokens[here], examples.is_learnt[here][1:]
            end = first + len(tokens) - 1
            input_ids[row, first:end] = tokens[:-1]
            labels[row, first:end] = np.where(learnt, tokens[1:], 0)
            loss_mask[row, first:end] = learnt
            positions[row, first:end] = np.arange(end - first)
            first = end
    input_ids_BS, slots_BS = split_slots(torch.from_numpy(input_ids))
    return Batch(
        input_ids_BS=input_ids_BS,
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.from_numpy(loss_mask),
        position_ids_BS=torch.from_numpy(positions),
        row_blocks=tuple(_find_blocks(examples, members, seq_len) for members in rows) if packed else None,
        row_ids_B=torch.tensor(row_ids, dtype=torch.int64),
        num_loss_tokens=num_loss_tokens,
        num_tokens=num_tokens,
        slots_BS=slots_BS if examples.has_slots else None,
    )


def _find_blocks(examples: Examples, members: NDArray[np.int64], seq_len: int) -> tuple[int, ...]:
    """Positions of each example of a row, then of its padding."""
    lengths: list[int] = (examples.starts[members + 1] - examples.starts[members] - 1).tolist()
    padding = seq_len - sum(lengths)
    return (*lengths, padding) if padding else tuple(lengths)
