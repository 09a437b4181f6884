"""The decoding loop, between a model that runs step by step and a search that chooses tokens.

Shapes: B contexts, R rows that run (B, or B x beams), V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from lora_dist.generation.batches import PromptBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choice:
    """What runs next."""

    tokens_R: torch.Tensor
    """int64; one new token a row."""
    source_R: torch.Tensor
    """int64; the row of the last step that each row goes on from."""
    finished: bool
    """True where no row has anything to go on with."""


class Search(Protocol):
    """How tokens are chosen; it keeps what was chosen."""

    @property
    def num_rows(self) -> int:
        """Rows of every choice."""

    def choose(self, logits_RV: torch.Tensor) -> Choice:
        """Given the logits after each running row's last token; R is the number of contexts at first."""

    def results(self) -> list[list[int]]:
        """New tokens of each context, without the end token."""


class IncrementalModel(Protocol):
    """A model that keeps keys and values. Spread over processes, only one of them sees logits and chooses."""

    def prefill(self, batch: PromptBatch) -> torch.Tensor | None:
        """Logits [B, V] after the last token of each context; None on a process that does not choose."""

    def agree(self, search: Search, logits_RV: torch.Tensor | None) -> Choice:
        """What `search` chooses from the logits, on the process that has them; the others are told."""

    def step(self, choice: Choice) -> torch.Tensor | None:
        """Run one token a row; logits [R, V] after it, or None."""


@torch.no_grad()
def decode(model: IncrementalModel, search: Search, batch: PromptBatch) -> None:
    """Run until the search has finished; `search` then has the results on the process that chose."""
    logits = model.prefill(batch)
    while not (choice := model.agree(search, logits)).finished:
        logits = model.step(choice)
