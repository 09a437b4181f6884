"""The training and validation examples a configuration names, and the record of where they came from."""

import hashlib
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lora_dist.config import DataConfig, RunConfig
from lora_dist.data.examples import Examples, draw_fake_examples, encode_pairs
from lora_dist.data.readers import read_pairs
from lora_dist.data.report import FileReport
from lora_dist.data.rows import BadRows, read_file
from lora_dist.data.tokenizer import load_model_tokenizer
from lora_dist.lora.factors import derive_seed
from lora_dist.prefix_config import PrefixConfig

_FAKE_VALID_SHARE = 8
"""Fake data has one validation example to so many training examples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Split:
    """The examples of one split and its file, None where they are drawn."""

    examples: Examples
    file: FileReport | None


def load_splits(config: RunConfig) -> tuple[Split, Split | None]:
    """(train, valid); valid is None where data.valid is not set."""
    data = config.data
    if data.format == "fake":
        return _draw_splits(config)
    assert data.train is not None  # DataConfig has checked it
    tokenizer = load_model_tokenizer(config.model)
    load = partial(load_split, data=data, tokenizer=tokenizer, slots=config.slots)
    train = load("data.train", data.train, max_examples=data.max_train_examples, part=data.train_split)
    if data.valid is None:
        return train, None
    return train, load("data.valid", data.valid, max_examples=data.max_valid_examples, part=data.valid_split)


def load_split(
    key: str,
    path: str,
    data: DataConfig,
    max_examples: int | None,
    tokenizer: PreTrainedTokenizerFast,
    part: str | None = None,
    slots: PrefixConfig | None = None,
) -> Split:
    """Examples of the file `path`, or of its `part`, which the configuration names in `key`.

    With `max_examples` the file is read until that many rows were good; what follows is not looked at.
    """
    content = read_file(key, path)
    bad = BadRows(path, data.on_bad_row)
    pairs = list(islice(read_pairs(content, data.format, bad, split=part), max_examples))
    examples = encode_pairs(pairs, tokenizer, seq_len=data.seq_len, bad=bad, slots=slots)
    if len(examples) == 0:
        found = ", ".join(f"{count} x {reason}" for reason, count in sorted(bad.counts.items())) or "it is empty"
        raise ValueError(f"{key}={path}: no row is usable as {data.format} ({found}); give a file that has some")
    report = FileReport(
        name=Path(path).name,
        sha256=hashlib.sha256(content).hexdigest(),
        num_examples=len(examples),
        skipped_rows=dict(sorted(bad.counts.items())),
    )
    return Split(examples=examples, file=report)


def _draw_splits(config: RunConfig) -> tuple[Split, Split]:
    data, seed = config.data, config.loop.seed
    sizes = {
        "train": min(data.num_fake_examples, data.max_train_examples or data.num_fake_examples),
        "valid": min(
            max(1, data.num_fake_examples // _FAKE_VALID_SHARE), data.max_valid_examples or data.num_fake_examples
        ),
    }
    train, valid = (
        Split(
            examples=draw_fake_examples(
                size,
                vocab_size=config.model.vocab_size,
                seq_len=data.seq_len,
                seed=derive_seed(seed, name),
                slots=config.slots,
            ),
            file=None,
        )
        for name, size in sizes.items()
    )
    return train, valid
