"""Many contexts answered by a sharded model, batch after batch, what is known already left out.

Every process of the job runs it.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from lora_dist.checkpoint.method_store import StoredMethod
from lora_dist.checkpoint.row_file import RowFile
from lora_dist.checkpoint.store import StoredAdapter
from lora_dist.data.examples import tokenize_texts
from lora_dist.generation_config import GenerationConfig, check_room
from lora_dist.mcore.generate import choose_answers, generate_rows
from lora_dist.mcore.model import ShardedGpt
from lora_dist.questions import Questions
from lora_dist.topology import run_on_first

_CHANGES_NO_TEXT = ("batch_size",)


def generate_texts(gpt: ShardedGpt, asked: Questions, config: GenerationConfig, file: RowFile | None) -> list[str]:
    """A text for each row, the same on every process, each kept in `file` once it is known. Collective.

    Rows that are equal have one text unless they are drawn: E2E repeats a context often. ValueError before anything
    runs for a context that leaves no room.
    """
    check_room([len(prompt) for prompt in asked.prompts], config.max_new_tokens, gpt.model)
    drawn = config.temperature > 0

    def answer(rows: list[int]) -> list[str]:
        tokens = generate_rows(
            gpt,
            [asked.prompts[row] for row in rows],
            config,
            end_tokens=asked.end_tokens,
            adapter_of_row=asked.choose_adapters(rows),
            row_ids=rows,
        )
        return asked.decode(tokens)

    keys = [
        (tuple(prompt), *asked.choose_adapters([row]), row if drawn else None)
        for row, prompt in enumerate(asked.prompts)
    ]
    return _answer_rows(gpt, keys, asked, answer, batch_size=config.batch_size, file=file)


def choose_labels(
    gpt: ShardedGpt, asked: Questions, labels: Sequence[str], *, batch_size: int, file: RowFile | None
) -> list[str]:
    """Each row's most likely label, otherwise as `generate_texts`. Collective."""
    tokens = [[*label, *asked.end_tokens[:1]] for label in encode_labels(labels, asked)]

    def answer(rows: list[int]) -> list[str]:
        prompts, adapters = [asked.prompts[row] for row in rows], asked.choose_adapters(rows)
        return asked.decode(choose_answers(gpt, prompts, tokens, batch_size=batch_size, adapter_of_row=adapters))

    keys = [(tuple(prompt), *asked.choose_adapters([row])) for row, prompt in enumerate(asked.prompts)]
    return _answer_rows(gpt, keys, asked, answer, batch_size=batch_size, file=file)


def encode_labels(labels: Sequence[str], asked: Questions) -> list[list[int]]:
    """As targets are in training, without the end token."""
    return list(tokenize_texts([asked.answer_prefix + label for label in labels], asked.tokenizer, "labels"))


def _answer_rows(
    gpt: ShardedGpt,
    keys: Sequence[Hashable],
    asked: Questions,
    answer: Callable[[list[int]], list[str]],
    *,
    batch_size: int,
    file: RowFile | None,
) -> list[str]:
    """`answer` gets as many rows as the replicas run at once, the longest first, one of those with equal keys."""
    topology = gpt.topology
    texts = run_on_first(topology, lambda: {} if file is None else file.begin())
    first_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    missing = sorted(set(first_of.values()) - texts.keys(), key=lambda row: (-len(asked.prompts[row]), row))
    at_once = batch_size * topology.dp_size
    for first in range(0, len(missing), at_once):
        rows = missing[first : first + at_once]
        known = dict(zip(rows, answer(rows), strict=True))
        if file is not None:
            run_on_first(topology, partial(file.append, known))
        texts.update(known)
    return [texts[first_of[key]] for key in keys]


def describe_questions(
    gpt: ShardedGpt,
    base_fingerprint: str,
    adapters: Sequence[StoredAdapter | StoredMethod],
    asked: Questions,
    *,
    merge: bool,
) -> dict[str, Any]:
    """What the texts depend on besides how they are chosen; topology and batch size change none but by rounding."""
    return {
        "base_fingerprint": base_fingerprint,
        "model.base_format": gpt.model.base_format,
        "dtype": str(gpt.config.params_dtype).removeprefix("torch."),
        "adapters": [_hash(sorted(one.manifest["sha256"].items())) for one in adapters],
        "merge": merge,
        "contexts": _hash([asked.prompts, list(asked.adapter_of_row)]),
        "end_context": asked.form.end_context,
    }


def describe_generation(config: GenerationConfig) -> dict[str, Any]:
    """How texts are chosen, by the keys of the configuration."""
    names = [field.name for field in fields(GenerationConfig) if field.name not in _CHANGES_NO_TEXT]
    return {f"generate.{name}": getattr(config, name) for name in names}


def describe_labels(labels: Sequence[str]) -> dict[str, Any]:
    """What is chosen among."""
    return {"labels": f"{len(labels)} labels, {_hash(list(labels))}"}


def _hash(content: object) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"
