"""The training and validation examples a configuration names, and the record of where they came from."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from lora_dist.config import DataConfig, RunConfig
from lora_dist.data.chat import ChatTemplate, encode_conversations, load_chat_template
from lora_dist.data.conversations import Conversation, read_conversations
from lora_dist.data.examples import Examples, concatenate_examples, draw_fake_examples, encode_pairs
from lora_dist.data.readers import read_pairs
from lora_dist.data.report import FileReport
from lora_dist.data.rows import BadRows, Fields, Pair, decode, read_file
from lora_dist.data.running_text import encode_documents, read_documents
from lora_dist.data.sharing import Share, encode_alone
from lora_dist.data.tokenizer import load_model_tokenizer
from lora_dist.lora.factors import derive_seed

_Row = TypeVar("_Row")
_FAKE_VALID_SHARE = 8
"""Fake data has one validation example to so many training examples."""
Encode = Callable[[bytes, int | None, BadRows], Examples]
"""(a file's content, the most rows of it, its bad rows) -> examples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Split:
    """The examples of one split and its file, None where they are drawn."""

    examples: Examples
    file: FileReport | None


def load_splits(config: RunConfig, share: Share = encode_alone) -> tuple[Split, Split | None]:
    """(train, valid); valid is None where data.valid is not set. Collective where `share` is."""
    data = config.data
    if data.format == "fake":
        return _draw_splits(config)
    assert data.train is not None  # DataConfig has checked it
    tokenizer = load_model_tokenizer(config.model)
    load, choose = partial(load_split, data=data), partial(choose_encoder, config, tokenizer, share=share)
    train = load("data.train", data.train, encode=choose(data.train_split), max_examples=data.max_train_examples)
    if data.valid is None:
        return train, None
    return train, load("data.valid", data.valid, encode=choose(data.valid_split), max_examples=data.max_valid_examples)


def choose_encoder(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, part: str | None = None, *, share: Share = encode_alone
) -> Encode:
    """What makes examples of a file, or of its `part`; ValueError without the chat template that a format asks for."""
    data = config.data
    fields = Fields(context=tuple(data.context_fields), target=data.target_field)
    if data.format == "chat":
        template = load_chat_template(config.model, tokenizer)
        return partial(_encode_chat, data=data, fields=fields, template=template, share=share)
    if data.format == "text":
        return partial(_encode_text, data=data, tokenizer=tokenizer, share=share)
    return partial(_encode_pairs, config=config, fields=fields, tokenizer=tokenizer, part=part, share=share)


def _encode_pairs(
    content: bytes,
    most: int | None,
    bad: BadRows,
    *,
    config: RunConfig,
    fields: Fields,
    tokenizer: PreTrainedTokenizerFast,
    part: str | None,
    share: Share,
) -> Examples:
    data = config.data
    pairs = read_pairs(content, data.format, bad, split=part, fields=fields)

    def encode(chosen: Sequence[Pair], bad: BadRows) -> Examples:
        return encode_pairs(chosen, tokenizer, seq_len=data.seq_len, bad=bad, slots=config.slots)

    return _encode_first(pairs, most, bad, partial(share, encode=encode))


def _encode_chat(
    content: bytes,
    most: int | None,
    bad: BadRows,
    *,
    data: DataConfig,
    fields: Fields,
    template: ChatTemplate,
    share: Share,
) -> Examples:
    rows = read_conversations(decode(content), bad, fields=fields, system=data.system)

    def encode(chosen: Sequence[Conversation], bad: BadRows) -> Examples:
        return encode_conversations(chosen, template, seq_len=data.seq_len, learn_turns=data.learn_turns, bad=bad)

    return _encode_first(rows, most, bad, partial(share, encode=encode))


def _encode_first(rows: Iterator[_Row], most: int | None, bad: BadRows, encode: Callable[..., Examples]) -> Examples:
    """The file's first rows that can be encoded, `most` of them; what `encode` leaves out is made up for by later rows.

    No row behind the last one wanted is read.
    """
    parts, missing = [], most
    while chosen := list(islice(rows, missing)):
        num_bad = bad.counts.total()
        parts.append(encode(chosen, bad=bad))
        if missing is not None:
            missing -= len(chosen) - (bad.counts.total() - num_bad)
    return concatenate_examples(parts or [encode([], bad=bad)])


def _encode_text(
    content: bytes,
    most: int | None,
    bad: BadRows,
    *,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    share: Share,
) -> Examples:
    documents = list(islice(read_documents(content, bad, field=data.text_field), most))
    return share(documents, lambda mine, _: encode_documents(mine, tokenizer, seq_len=data.seq_len), bad)


def load_split(key: str, path: str, *, data: DataConfig, encode: Encode, max_examples: int | None) -> Split:
    """Examples that `encode` makes of the file `path`, which the configuration names in `key`.

    With `max_examples` the file is read until that many rows were good and fit; what follows is not looked at.
    """
    content = read_file(key, path)
    bad = BadRows(path, data.on_bad_row)
    examples = encode(content, max_examples, bad)
    if len(examples) == 0:
        found = bad.describe() or "it is empty"
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
