"""What a run reads: files, formats and the shape of their rows; standard library only."""

from dataclasses import dataclass

from lora_dist.refusals import require, require_one_of

FILE_FORMATS = (
    *("e2e_text", "e2e_csv", "jsonl", "webnlg", "dart", "wikisql", "samsum", "dialogsum", "banking77", "clinc150"),
    *(f"glue_{task}" for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")),
)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Pairs of (context, target); the loss is on the target's tokens (eq. 1 of the paper)."""

    name: str
    format: str
    """e2e_text (`context||target`), e2e_csv (`mr,ref`), jsonl (`context`, `target`), webnlg, dart, wikisql, samsum,
    dialogsum, banking77, clinc150, glue_cola ... glue_wnli (their own files), or fake (random tokens)."""
    train: str | None = None
    """Path of the training file."""
    valid: str | None = None
    """Path of the validation file; null means no validation."""
    train_split: str | None = None
    """Part of data.train to use, where one file holds several (clinc150)."""
    valid_split: str | None = None
    seq_len: int = 512
    """Positions of a row, and the most an example may take up."""
    collate: str = "pack"
    """pack: several examples a row, attention kept apart; pad: one example a row, padded to the longest."""
    on_bad_row: str = "error"
    """error stops at the first bad row and names it; skip counts it."""
    max_train_examples: int | None = None
    """Use only the file's first good rows, so many of them; null means all."""
    max_valid_examples: int | None = None
    num_fake_examples: int = 1024
    """Training examples of format fake; validation gets an eighth of it."""

    def __post_init__(self) -> None:
        require_one_of("data.format", self.format, (*FILE_FORMATS, "fake"))
        require_one_of("data.collate", self.collate, ("pack", "pad"))
        require_one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len} must be at least 2")
        require(
            self.format == "fake" or self.train is not None,
            f"data.train is not set; give the path of a {self.format} file",
        )
        require(
            self.format != "fake" or (self.train is None and self.valid is None),
            f"data.format=fake reads no file; set data.train={self.train} and data.valid={self.valid} to null",
        )
        for key in ("max_train_examples", "max_valid_examples", "num_fake_examples"):
            count = getattr(self, key)
            require(count is None or count >= 1, f"data.{key}={count} must be at least 1")
