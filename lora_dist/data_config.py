"""What a run reads: files, formats and the shape of their rows; standard library only."""

from dataclasses import MISSING, dataclass, field, fields

from lora_dist.refusals import require, require_one_of

FIELD_FORMATS = ("jsonl", "chat")
"""Whose rows name their fields."""
FILE_FORMATS = (
    *FIELD_FORMATS,
    *("e2e_text", "e2e_csv", "webnlg", "dart", "wikisql", "samsum", "dialogsum", "banking77", "clinc150"),
    *(f"glue_{task}" for task in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")),
)
SPLIT_FORMATS = ("clinc150",)
"""Whose files hold several splits."""
_READ_BY = {
    "context_fields": FIELD_FORMATS,
    "target_field": FIELD_FORMATS,
    "text_field": ("text",),
    "system": ("chat",),
    "learn_turns": ("chat",),
    "train_split": SPLIT_FORMATS,
    "valid_split": SPLIT_FORMATS,
}
"""Keys that only some formats read."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Pairs of (context, target), the loss being on the target's tokens (eq. 1 of the paper), conversations, whose
    answers are learnt, or running text, which is learnt whole."""

    name: str
    format: str
    """jsonl (`context`, `target`), chat (`messages`, through the model's chat template), text (documents, all of them
    learnt), e2e_text (`context||target`), e2e_csv (`mr,ref`), webnlg, dart, wikisql, samsum, dialogsum, banking77,
    clinc150, glue_cola ... glue_wnli (their own files), or fake (random tokens)."""
    train: str | None = None
    """Path of the training file."""
    valid: str | None = None
    """Path of the validation file; null means no validation."""
    train_split: str | None = None
    """Part of data.train to use, where one file holds several (clinc150)."""
    valid_split: str | None = None
    context_fields: list[str] = field(default_factory=lambda: ["context"])
    """Of jsonl's rows, and of chat's that have neither `messages` nor `conversations`: the keys whose texts are the
    context (of a chat the user's message), a blank line between them, e.g. [instruction,input]."""
    target_field: str = "target"
    """The key of the target, of a chat the answer."""
    text_field: str = "text"
    """Of format text, where the file is .jsonl or .json: the key of a row's document."""
    system: str | None = None
    """Of format chat: the system message of conversations that have none."""
    learn_turns: str = "all"
    """Of format chat: all of a conversation's answers are learnt, or the last."""
    seq_len: int = 512
    """Positions of a row, and the most an example may take up; documents of format text are cut to it."""
    collate: str = "pack"
    """pack: several examples a row, attention kept apart; pad: one example a row, padded to the longest."""
    on_bad_row: str = "error"
    """error stops at the first bad row and names it; skip counts it."""
    max_train_examples: int | None = None
    """Use only the file's first good rows that fit into data.seq_len, so many of them; null means all."""
    max_valid_examples: int | None = None
    num_fake_examples: int = 1024
    """Training examples of format fake; validation gets an eighth of it."""

    def __post_init__(self) -> None:
        require_one_of("data.format", self.format, (*FILE_FORMATS, "text", "fake"))
        require_one_of("data.learn_turns", self.learn_turns, ("all", "last"))
        require(len(self.context_fields) > 0, "data.context_fields is empty; name at least one key")
        require_one_of("data.collate", self.collate, ("pack", "pad"))
        require_one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len} must be at least 2")
        require(
            self.format == "fake" or self.train is not None,
            f"data.train is not set; give the path of a file in format {self.format}",
        )
        require(
            self.format != "fake" or (self.train is None and self.valid is None),
            f"data.format=fake reads no file; set data.train={self.train} and data.valid={self.valid} to null",
        )
        for key in ("max_train_examples", "max_valid_examples", "num_fake_examples"):
            count = getattr(self, key)
            require(count is None or count >= 1, f"data.{key}={count} must be at least 1")
        require_split("data.train_split", self.train_split, self.format, example="train")
        if self.valid is not None:
            require_split("data.valid_split", self.valid_split, self.format, example="val")
        self._check_foreign_keys()

    @property
    def leaves_text_open(self) -> bool:
        """Whether the file alone does not say what is read: keys here, or a chat template, do."""
        return self.format in ("chat", "text") or (self.context_fields, self.target_field) != (["context"], "target")

    def _check_foreign_keys(self) -> None:
        """What only some formats read must not be set with another."""
        for one in fields(self):
            formats = _READ_BY.get(one.name, ())
            plain = one.default if one.default_factory is MISSING else one.default_factory()
            require(
                not formats or self.format in formats or getattr(self, one.name) == plain,
                f"data.{one.name}={getattr(self, one.name)}: data.format={self.format} does not read it, only"
                f" {' and '.join(formats)}; leave it {plain}",
            )


def require_split(key: str, split: str | None, file_format: str, *, example: str) -> None:
    """ValueError, naming `key`, where a file of the format holds several splits and none is chosen."""
    require(
        split is not None or file_format not in SPLIT_FORMATS,
        f"{key} is not set, and a file in format {file_format} holds several splits; name one, e.g. {key}={example}",
    )
