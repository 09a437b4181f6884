"""What `lora-dist evaluate` does: ask a model, or read a file of outputs; score them; tell where the run is tracked."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_dist.adapter_jobs import Stored, find_slots, open_base, open_on_base, put_adapters, tell
from lora_dist.answers import (
    choose_labels,
    describe_generation,
    describe_labels,
    describe_questions,
    generate_texts,
)
from lora_dist.checkpoint.row_file import RowFile
from lora_dist.config import TrackConfig
from lora_dist.evaluate_config import EvaluateConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.mcore.model import ShardedGpt
from lora_dist.measure.wandb_sink import open_wandb
from lora_dist.questions import QuestionForm, Questions, build_questions, choose_form
from lora_dist.run_dir import find_adapter, find_run, read_run
from lora_dist.tasks.items import Item, load_items
from lora_dist.tasks.labels import find_labels
from lora_dist.tasks.scores import Scores, list_columns
from lora_dist.tasks.scoring import score, write_scores
from lora_dist.topology import run_on_first


def evaluate_model(config: EvaluateConfig, texts_path: Path) -> None:
    """Ask the model every context of the task, write what it says to `texts_path` and the scores beside it.

    Every process of the job calls it. ValueError, before the model is asked, where the outputs could not be scored.
    """
    with open_base(config) as gpt:
        items = run_on_first(gpt.topology, lambda: _load(config))
        labels = run_on_first(gpt.topology, lambda: find_labels(config.task, items))
        texts = _ask(gpt, config, items, labels, texts_path)
        tell(gpt, f"{len(texts)} outputs: {texts_path}")
        is_first = gpt.topology.global_rank == 0
    if is_first:
        scores = _score(config, items, labels, texts)
        write_scores(config.task, scores, str(texts_path), config.output)
        _track(config, scores)


def _ask(
    gpt: ShardedGpt, config: EvaluateConfig, items: Sequence[Item], labels: Sequence[str], path: Path
) -> list[str]:
    """What the model says to each item, in `path` too."""
    adapters = []
    if config.adapter is not None:
        adapters = [open_on_base(gpt, config, find_adapter(config.adapter))]
    # What a whole batch shares costs a pass over the weights at every token while it is beside them.
    fits = config.model.base_format == "native" and bool(adapters)
    merge = config.merge or (fits and adapters[0].needs_merge)
    put_adapters(gpt, adapters, merge=merge)
    asked = build_questions(
        [item.context for item in items],
        config.model,
        run_on_first(gpt.topology, lambda: _choose_form(config)),
        adapter_of_row=[0] * len(items) if adapters and not merge else [],
        slots=find_slots(adapters),
    )
    file = _open_file(gpt, config, adapters, asked, labels, path, merge=merge)
    if labels:
        texts = choose_labels(gpt, asked, labels, batch_size=config.generate.batch_size, file=file)
    else:
        texts = generate_texts(gpt, asked, config.generate, file)
    run_on_first(gpt.topology, partial(_finish, file, items, texts, config.adapter))
    return texts


def _choose_form(config: EvaluateConfig) -> QuestionForm:
    adapters = [] if config.adapter is None else [find_adapter(config.adapter)]
    is_chat = config.task.format == "chat"
    return choose_form(config.model, adapters, chat=config.chat, system=config.system, conversations=is_chat)


def _score(config: EvaluateConfig, items: Sequence[Item], labels: Sequence[str], texts: Sequence[str]) -> Scores:
    scores = score(config.task, texts, items)
    if not labels:
        return scores
    note = f"each output is the most likely of {len(labels)} labels, by the log-likelihood of all its tokens"
    return replace(scores, notes=[*scores.notes, note])


def _load(config: EvaluateConfig) -> list[Item]:
    """The task's items, once a few of their own references have been scored: a missing package is told now."""
    items = load_items(config.task)
    few = items[:2]
    score(config.task, [item.references[0] for item in few], few)
    return items


def _open_file(
    gpt: ShardedGpt,
    config: EvaluateConfig,
    adapters: Sequence[Stored],
    asked: Questions,
    labels: Sequence[str],
    path: Path,
    *,
    merge: bool,
) -> RowFile:
    fingerprint = run_on_first(gpt.topology, lambda: compute_base_fingerprint(config.model, config.seed))
    identity = describe_questions(gpt, fingerprint, adapters, asked, merge=merge)
    identity |= describe_labels(labels) if labels else describe_generation(config.generate)
    return RowFile(path=path, identity=identity, num_rows=len(asked.prompts))


def _finish(file: RowFile, items: Sequence[Item], texts: Sequence[str], adapter: str | None) -> None:
    file.finish(
        {"context": item.context, "text": text, "adapter": adapter} for item, text in zip(items, texts, strict=True)
    )


def _track(config: EvaluateConfig, scores: Scores) -> None:
    """Into the W&B run of the run that trained the adapter, where there is one."""
    run_dir = None if config.adapter is None else find_run(find_adapter(config.adapter))
    if run_dir is None:
        return
    run = read_run(run_dir)
    name = f"{run['method']}-{run['model']['name']}"
    about: dict[str, Any] = {"evaluate": {scores.task: asdict(config)}}
    with open_wandb(TrackConfig(**run["track"]), run_dir, about, name=name, global_rank=0) as sink:
        values = {row.label: dict(row.values) for row in scores.rows}
        sink.log_summary({"evaluate": {scores.task: values}})
        sink.log_table(f"evaluate/{scores.task}", *list_columns(scores))
