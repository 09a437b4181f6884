"""What was read and how it fills the rows, for the record of a run."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """One file that was read."""

    name: str
    """Without its directory: config.yaml has that, and a record that is handed on need not."""
    sha256: str
    num_examples: int
    skipped_rows: dict[str, int]
    """Bad rows by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """The splits of a run; `dataclasses.asdict` of it is JSON."""

    files: dict[str, FileReport] = field(default_factory=dict)
    """By split, train or valid; empty for fake data."""
    num_train_examples: int
    num_valid_examples: int
    skipped_rows: dict[str, int]
    """Bad rows by reason, over all files."""
    rows_per_epoch: int
    tokens_per_epoch: int
    """Positions of the training split that are not padding."""
    loss_tokens_per_epoch: int
    padding_fraction: float
    """Padding over all positions of the first training epoch."""
