"""The loaders of a run: which rows make a step's global batch, and this replica's share of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_dist.batch import Batch
from lora_dist.config import RunConfig, compute_num_microbatches
from lora_dist.data.collate import collate_rows
from lora_dist.data.examples import Examples
from lora_dist.data.packing import Layout, build_layout, shuffle_layout
from lora_dist.data.report import DataReport
from lora_dist.data.sharing import Share, encode_alone
from lora_dist.data.splits import Split, load_splits

_Rows = Sequence[NDArray[np.int64]]
_EMPTY_ROW = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How a global batch is cut: row r goes to microbatch r // (micro x dp) of replica r // micro % dp."""

    micro_batch_size: int
    num_microbatches: int
    dp_size: int
    dp_rank: int
    seq_len: int
    """Positions of a packed row, the most of a padded one."""
    packed: bool
    seq_len_multiple: int
    """Padded rows are a multiple of this, so that they can be cut over processes."""

    @property
    def rows_per_pass(self) -> int:
        return self.micro_batch_size * self.dp_size

    @property
    def global_batch_size(self) -> int:
        return self.rows_per_pass * self.num_microbatches


class Loader:
    """Batches of one split, each a pure function of (configuration, step): nothing is consumed, nothing to be saved."""

    def __init__(self, examples: Examples, shape: BatchShape, *, seed: int) -> None:
        self._examples, self._shape, self._seed = examples, shape, seed
        self._lengths, self._num_loss_tokens = examples.num_positions, examples.num_loss_tokens
        collate = "pack" if shape.packed else "pad"
        self._layout = build_layout(self._lengths, seq_len=shape.seq_len, collate=collate)
        self._epochs: dict[int, Layout] = {}

    def hash_examples(self) -> str:
        """Of `Examples.hash`: what a template, keys and a tokenizer have made of the file."""
        return self._examples.hash()

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self._layout.num_rows

    def batches_at(self, step: int) -> list[Batch]:
        """This replica's microbatches of step `step`.

        An epoch's last rows and the next one's first share a batch where the batch size does not divide the rows.
        """
        size = self._shape.global_batch_size
        return self._cut([self._get_shuffled_row(step * size + row) for row in range(size)])

    def validation_batches(self) -> Iterator[list[Batch]]:
        """The whole split once, unshuffled; the last batch has as few microbatches as hold its rows."""
        size = self._shape.global_batch_size
        for first in range(0, self.num_rows, size):
            yield self._cut([self._layout.get_row(row) for row in range(first, min(first + size, self.num_rows))])

    def compute_padding_fraction(self) -> float:
        """Padding over all positions of the first epoch's rows in their batches."""
        size, num_positions = self._shape.global_batch_size, 0
        for first in range(0, self.num_rows, size):
            rows = [self._get_shuffled_row(row) for row in range(first, min(first + size, self.num_rows))]
            num_positions += len(rows) * self._compute_seq_len(rows)
        return 1.0 - float(self._lengths.sum()) / num_positions

    def _get_shuffled_row(self, row: int) -> NDArray[np.int64]:
        """Examples of the row that is number `row` since the start of training."""
        epoch, visit = divmod(row, self.num_rows)
        if epoch not in self._epochs:
            kept = {known: layout for known, layout in self._epochs.items() if known == epoch - 1}
            shuffled = shuffle_layout(self._layout, self._lengths, seed=self._seed, epoch=epoch)
            self._epochs = {**kept, epoch: shuffled}
        return self._epochs[epoch].get_row(visit)

    def _cut(self, rows: _Rows) -> list[Batch]:
        """This replica's microbatches of the global batch `rows`, filled up with empty rows."""
        shape = self._shape
        members = np.concatenate(rows)
        rows = [*rows, *[_EMPTY_ROW] * (-len(rows) % shape.rows_per_pass)]
        seq_len = self._compute_seq_len(rows)
        first_of_passes = range(shape.dp_rank * shape.micro_batch_size, len(rows), shape.rows_per_pass)
        return [
            collate_rows(
                self._examples,
                rows[first : first + shape.micro_batch_size],
                seq_len=seq_len,
                packed=shape.packed,
                row_ids=range(first, first + shape.micro_batch_size),
                num_loss_tokens=int(self._num_loss_tokens[members].sum()),
                num_tokens=int(self._lengths[members].sum()),
            )
            for first in first_of_passes
        ]

    def _compute_seq_len(self, rows: _Rows) -> int:
        """Equal over the global batch, because pipeline stages and the schedule expect one shape."""
        if self._shape.packed:
            return self._shape.seq_len
        multiple = self._shape.seq_len_multiple
        return -(-int(self._lengths[np.concatenate(rows)].max()) // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaders:
    """What build_loaders returns."""

    train: Loader
    valid: Loader | None
    report: DataReport


def build_loaders(config: RunConfig, *, dp_size: int, dp_rank: int, share: Share = encode_alone) -> Loaders:
    """Read, encode and lay out the splits; the same on every process but for the replica's share. Collective where
    `share`, which encodes rows, is.

    ValueError for a missing file, a bad row, a tokenizer that is not the model's, or sizes that do not divide.
    """
    shape = _compute_batch_shape(config, dp_size, dp_rank)
    train_split, valid_split = load_splits(config, share)
    train = Loader(train_split.examples, shape, seed=config.loop.seed)
    valid = None if valid_split is None else Loader(valid_split.examples, shape, seed=config.loop.seed)
    return Loaders(train=train, valid=valid, report=_describe(train, train_split, valid_split))


def _compute_batch_shape(config: RunConfig, dp_size: int, dp_rank: int) -> BatchShape:
    return BatchShape(
        micro_batch_size=config.loop.micro_batch_size,
        num_microbatches=compute_num_microbatches(config.loop, dp_size),
        dp_size=dp_size,
        dp_rank=dp_rank,
        seq_len=config.data.seq_len,
        packed=config.data.collate == "pack",
        seq_len_multiple=config.topology.row_multiple,
    )


def _describe(loader: Loader, train: Split, valid: Split | None) -> DataReport:
    files = {name: s.file for name, s in (("train", train), ("valid", valid)) if s is not None and s.file is not None}
    reasons = sorted({reason for file in files.values() for reason in file.skipped_rows})
    return DataReport(
        files=files,
        num_train_examples=len(train.examples),
        num_valid_examples=0 if valid is None else len(valid.examples),
        skipped_rows={reason: sum(file.skipped_rows.get(reason, 0) for file in files.values()) for reason in reasons},
        rows_per_epoch=loader.num_rows,
        tokens_per_epoch=int(train.examples.num_positions.sum()),
        loss_tokens_per_epoch=int(train.examples.num_loss_tokens.sum()),
        padding_fraction=loader.compute_padding_fraction(),
    )
