"""Batches of an encoder's examples, each a pure function of the step. Shapes: B rows, S positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lora_dist.encoders.examples import Example
from lora_dist.lora.factors import derive_seed


@dataclass(kw_only=True, slots=True)
class EncoderBatch:
    """One microbatch of one replica."""

    inputs: dict[str, torch.Tensor]
    """[B, S]: input_ids, attention_mask, and token_type_ids where the tokenizer gives them."""
    labels_B: torch.Tensor
    """fp32; the label's number, or the value to predict."""
    counts_B: torch.Tensor
    """bool; False for rows that only fill up the last batch of a split."""
    num_rows: int
    """Of the whole global batch, fillers left out: the loss's denominator."""
    num_tokens: int
    """Of the whole global batch, padding and fillers left out."""

    @property
    def num_loss_tokens(self) -> int:
        """One label a row."""
        return self.num_rows


class EncoderLoader:
    """Row r of a global batch goes to microbatch r // (micro x dp) of replica r // micro % dp, as decoders' do."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        micro_batch_size: int,
        num_microbatches: int,
        dp_size: int,
        dp_rank: int,
        seed: int,
    ) -> None:
        self.examples, self._tokenizer, self._seed = examples, tokenizer, seed
        self._micro, self._dp_size, self._dp_rank = micro_batch_size, dp_size, dp_rank
        self.global_batch_size = micro_batch_size * dp_size * num_microbatches
        self._epoch, self._order = -1, torch.empty(0)

    def batches_at(self, step: int) -> list[EncoderBatch]:
        """This replica's microbatches; a last batch of an epoch goes on into the next one."""
        first = step * self.global_batch_size
        return self._cut([self._pick(first + row) for row in range(self.global_batch_size)])

    def validation_batches(self) -> Iterator[list[EncoderBatch]]:
        """The whole split once, in order."""
        for first in range(0, len(self.examples), self.global_batch_size):
            yield self._cut(list(range(first, min(first + self.global_batch_size, len(self.examples)))))

    def _pick(self, visit: int) -> int:
        epoch, place = divmod(visit, len(self.examples))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator)
        return int(self._order[place])

    def _cut(self, rows: list[int]) -> list[EncoderBatch]:
        num_rows, rows_per_pass = len(rows), self._micro * self._dp_size
        num_tokens = sum(self.examples[row].num_tokens for row in rows)
        rows = rows + rows[:1] * (-num_rows % rows_per_pass)
        batches = []
        for first in range(self._dp_rank * self._micro, len(rows), rows_per_pass):
            members = [self.examples[row] for row in rows[first : first + self._micro]]
            inputs = self._tokenizer.pad([one.inputs for one in members], return_tensors="pt")
            batches.append(
                EncoderBatch(
                    inputs=dict(inputs),
                    labels_B=torch.tensor([one.label for one in members], dtype=torch.float32),
                    counts_B=torch.arange(first, first + self._micro) < num_rows,
                    num_rows=num_rows,
                    num_tokens=num_tokens,
                )
            )
        return batches
