"""Contexts of different lengths as batches of rows. Shapes: B rows, S positions, R rows that run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptBatch:
    """Contexts padded on the left, so that all rows go on at the same column."""

    tokens_BS: torch.Tensor
    """int64; 0 in the padding, which no position looks at; negative where a trained vector stands for a token
    (lora_dist.prefix.slots)."""
    num_padding_B: torch.Tensor
    """int64."""
    row_ids: tuple[int, ...]
    """The rows' numbers among all contexts."""
    adapter_of_row: tuple[int | None, ...] = ()
    """Where several adapters are attached: each row's, None for the base alone."""

    @property
    def num_rows(self) -> int:
        return self.tokens_BS.shape[0]


def plan_batches(lengths: Sequence[int], *, batch_size: int, dp_size: int, dp_rank: int) -> list[list[int]]:
    """Row numbers of this replica's batches: contexts of like length together, batches dealt out in turn."""
    by_length = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    return batches[dp_rank::dp_size]


def pad_left(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], adapter_of_row: Sequence[int | None], device: torch.device
) -> PromptBatch:
    """The batch of rows `row_ids` out of all prompts."""
    chosen = [prompts[row] for row in row_ids]
    longest = max(map(len, chosen))
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in chosen]
    return PromptBatch(
        tokens_BS=torch.tensor(padded, dtype=torch.int64, device=device),
        num_padding_B=torch.tensor([longest - len(prompt) for prompt in chosen], dtype=torch.int64, device=device),
        row_ids=tuple(row_ids),
        adapter_of_row=tuple(adapter_of_row[row] for row in row_ids) if adapter_of_row else (),
    )


def compute_positions(num_padding_R: torch.Tensor, first: int, num_columns: int) -> torch.Tensor:
    """[R, columns]; the position of each column `first`, ... within its row's own text, 0 in the padding."""
    columns = torch.arange(first, first + num_columns, device=num_padding_R.device)
    return (columns - num_padding_R[:, None]).clamp(min=0)


def find_text(num_padding_R: torch.Tensor, first: int, num_columns: int) -> torch.Tensor:
    """bool [R, columns]; False where a column is padding."""
    columns = torch.arange(first, first + num_columns, device=num_padding_R.device)
    return columns >= num_padding_R[:, None]


def compute_mask(
    num_padding_R: torch.Tensor, first: int, num_columns: int, sliding_window: int | None = None
) -> torch.Tensor:
    """[R, 1, columns, first + columns], True where a column may look: at or before itself, within its window, not into
    the padding.

    Padding looks at itself, so that no row of the softmax is empty.
    """
    key = torch.arange(first + num_columns, device=num_padding_R.device)
    query = key[first:, None]
    own_text_RQK = (key <= query) & (key >= num_padding_R[:, None, None])
    if sliding_window is not None:
        own_text_RQK &= key > query - sliding_window
    return (own_text_RQK | (key == query))[:, None]
