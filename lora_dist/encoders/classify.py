"""What `lora-dist classify` does, from configuration to scores; every process of the job runs it."""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_dist.claim import claim_run_dir
from lora_dist.classify_config import ClassifyConfig
from lora_dist.data.glue import TASKS
from lora_dist.encoders.engine import compute_losses
from lora_dist.encoders.job import Job, keep_best, load_data, open_job, read_best, resume, save, write
from lora_dist.encoders.model import read_family
from lora_dist.epochs import settle_epochs
from lora_dist.loop import train_loop
from lora_dist.mcore.parallel import open_topology
from lora_dist.measure.memory import PeakMemoryMeter
from lora_dist.measure.meter import Meter
from lora_dist.measure.observers import open_observers
from lora_dist.out_of_memory import explain_out_of_memory, halve_micro_batch
from lora_dist.run_dir import name_trained, prepare_run_dir, write_config
from lora_dist.stopping import note_terminations, raise_stopped
from lora_dist.tasks.scores import Scores
from lora_dist.tasks.scoring import score, write_scores
from lora_dist.topology import check_device, choose_device, run_on_first
from lora_dist.validation import Validation
from lora_dist.writing import format_json, write_lines, write_text


def classify(config: ClassifyConfig) -> None:
    """Train where there is a training file, then score. ValueError for what the user can mend, on every process."""
    read_family(config.encoder)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(config.device, local_rank)
    check_device(device, config.dtype)
    less = [*halve_micro_batch(config.loop), "a shorter encoder.seq_len"]
    opened = open_topology(config.topology, device=device, local_rank=local_rank, seed=config.loop.seed)
    with opened as topology, explain_out_of_memory(device, less):
        if config.train is not None:
            run_on_first(topology, lambda: prepare_run_dir(config))
        data = load_data(config)
        if topology.global_rank == 0:
            print(*(f"{line}\n" for line in data.list_losses()), sep="", end="", flush=True)
        loop, optim = settle_epochs(config.loop, config.optim, rows_per_epoch=len(data.train), dp_size=topology.dp_size)
        given, config = config, replace(config, loop=loop, optim=optim)
        memory = PeakMemoryMeter(device)
        job = open_job(config, topology, data)
        summary: dict[str, Any] = {}
        if data.train:
            summary = train(job, memory, given)
        score_job(job, summary)


def train(job: Job, memory: PeakMemoryMeter, given: ClassifyConfig) -> dict[str, Any]:
    """The loop, its checkpoints, and the adapter (or model) at the end; what the summary says of it.

    `given` is the configuration before its epochs were made steps.
    """
    config, topology = job.config, job.topology
    claim = claim_run_dir(config.run_dir, topology)
    num_steps_done, valid_loss_before = resume(job)
    run_on_first(topology, lambda: write_config(given))
    meter = Meter(topology, num_warmup_steps=config.loop.num_warmup_steps_timing, memory=memory)
    name = f"{config.method}-{config.encoder.name}"
    observers = open_observers(config, topology, meter, name=name, num_steps_done=num_steps_done)
    with note_terminations(), observers as observe:  # until all is written, as in `run.train_method`
        result = train_loop(
            job.engine,
            job.loader(job.data.train),
            validate=lambda: validate(job),
            loop=config.loop,
            optim=config.optim,
            first_step=num_steps_done,
            meter=meter,
            open_probe=nullcontext,
            observe=observe,
            claim=claim,
            save=lambda step, before: save(job, step, before),
            keep_best=lambda step, validation: keep_best(job, step, validation),
            valid_loss_before=valid_loss_before,
        )
        if result.num_steps_done >= config.loop.total_steps:
            job.engine.zero.check_outcome(result.valid_loss_after)
            write(job, name_trained(config), result.num_steps_done, {"valid_loss": result.valid_loss_after})
    if result.num_steps_done < config.loop.total_steps:
        message = f"stopped after step {result.num_steps_done} of {config.loop.total_steps}, as asked, and saved"
        run_on_first(topology, lambda: print(f"{message}; resume=auto goes on", file=sys.stderr, flush=True))
        raise_stopped(message)
    throughput = meter.summarize()
    return {
        **asdict(result),
        "num_trainable_parameters": sum(math.prod(one.full_shape) for one in job.engine.trainable),
        "num_trained_of_head": sum(
            math.prod(one.full_shape) for one in job.engine.trainable if job.encoder.is_head(one.name)
        ),
        "throughput": None if throughput is None else asdict(throughput),
        "peak_memory": asdict(memory.read()),
        "checkpoint": name_trained(config).name,
        "best": run_on_first(topology, lambda: read_best(job)),
    }


def validate(job: Job) -> Validation:
    """The mean loss a row, and the task's scores; every process calls it."""
    outputs, texts = job.answer(job.data.scored)
    labels_B = torch.tensor([example.label for example in job.data.scored])
    loss = compute_losses(outputs, labels_B).double().mean().item()
    scores = _list_scores(score(job.config.task, texts, job.data.items))
    return {"valid_loss": loss, **{f"valid_{metric.lower()}": value for metric, value in scores.items()}}


def score_job(job: Job, summary: dict[str, Any]) -> None:
    """Predictions as JSON lines that `lora-dist evaluate predictions=FILE` takes, their scores, and summary.json."""
    config, items = job.config, job.data.items
    _, texts = job.answer(job.data.scored)
    predictions = job.answer(job.data.asked)[1] if job.data.asked else []
    if job.topology.global_rank != 0:
        return
    if predictions:
        _write_predictions(job, predictions)
    path = Path(config.run_dir) / f"classify-{config.task.name}.jsonl"
    write_lines(path, ({"context": item.context, "text": text} for item, text in zip(items, texts, strict=True)))
    scores = score(config.task, texts, items)
    write_scores(config.task, scores, str(path), None)
    if summary.get("best"):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items() if value is not None)
        print(f"best validation: {shown}; in {name_trained(config, best=True)}", flush=True)
    summary = {"method": config.method, **summary, "data": job.data.describe(), "scores": _list_scores(scores)}
    write_text(path.parent / "summary.json", format_json(summary))


def _write_predictions(job: Job, predictions: Sequence[str]) -> None:
    """Of config.predict; GLUE's also as its server takes them: a row's number, and the label in its files' terms."""
    task = job.config.task
    path = Path(job.config.run_dir) / f"predictions-{task.name}.jsonl"
    answered = zip(job.data.contexts, predictions, strict=True)
    write_lines(path, ({"context": context, "text": text} for context, text in answered))
    if task.format.startswith("glue_"):
        own = {word: label for label, word in TASKS[task.format.removeprefix("glue_")].words.items()}
        rows = [f"{row}\t{own.get(text, text)}\n" for row, text in enumerate(predictions)]
        write_text(path.with_suffix(".tsv"), "".join(["index\tprediction\n", *rows]))


def _list_scores(scores: Scores) -> dict[str, float | None]:
    return {metric: value for row in scores.rows for metric, value in row.values.items()}
