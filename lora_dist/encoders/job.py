"""One encoder in training: its data, model and engine, and what it leaves behind."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lora_dist.checkpoint.resume import find_newest_checkpoint, load_checkpoint, save_checkpoint
from lora_dist.classify_config import ClassifyConfig
from lora_dist.config import compute_num_microbatches
from lora_dist.data.rows import BadRows, Pair
from lora_dist.encoders.adapt import apply_encoder_method
from lora_dist.encoders.batches import EncoderLoader
from lora_dist.encoders.engine import EncoderEngine
from lora_dist.encoders.examples import (
    Example,
    Labels,
    encode_examples,
    find_label_words,
    load_pairs,
    load_unlabelled,
    open_tokenizer,
)
from lora_dist.encoders.model import Encoder, open_encoder
from lora_dist.encoders.store import load_trained, read_trained_labels, write_trained
from lora_dist.files.directories import read_manifest
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.run_dir import name_trained
from lora_dist.tasks.items import Item, load_items
from lora_dist.topology import DTYPES, Topology, run_on_first
from lora_dist.validation import Best, Validation
from lora_dist.whole import iterate_model, list_whole, write_together
from lora_dist.zero.engine import build_zero_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The files as examples."""

    train: list[Example]
    """Empty where nothing trains."""
    scored: list[Example]
    items: list[Item]
    """What `scored` should be answered."""
    asked: list[Example]
    """Of config.predict, without labels; empty where that is not set."""
    contexts: list[str]
    """What `asked` is about."""
    labels: Labels
    tokenizer: PreTrainedTokenizerBase
    train_sha256: str
    scored_sha256: str
    skipped: BadRows
    """Of the training file."""

    def describe(self) -> dict[str, Any]:
        """What was read, for summary.json."""
        files = {"train": self.train, "references": self.scored} | ({"predict": self.asked} if self.asked else {})
        counts: dict[str, Any] = {
            name: {"num_rows": len(examples), "num_cut": sum(example.is_cut for example in examples)}
            for name, examples in files.items()
        }
        counts["train"]["skipped_rows"] = dict(sorted(self.skipped.counts.items()))
        return counts

    def list_losses(self) -> list[str]:
        """The same in words, where something of a file was left out."""
        told = [f"bad rows of train left out: {self.skipped.describe()}"] if self.skipped.counts else []
        return told + [
            f"{counts['num_cut']} of {counts['num_rows']} inputs of {name} are cut to encoder.seq_len tokens"
            for name, counts in self.describe().items()
            if counts["num_cut"]
        ]


@dataclass(kw_only=True, slots=True)
class Job:
    """One encoder in training, and what its checkpoints have to know."""

    config: ClassifyConfig
    topology: Topology
    encoder: Encoder
    engine: EncoderEngine
    data: Data
    base_fingerprint: str
    best: Best = field(default_factory=lambda: Best(highest=True))
    """By the task's first score."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it; optim and num_steps may change."""
        config, loop = self.config, self.config.loop
        return {
            "base_fingerprint": self.base_fingerprint,
            "method": config.method,
            "lora": asdict(config.lora) if config.method == "lora" else None,
            "labels": list(self.data.labels.words),
            "encoder.seq_len": config.encoder.seq_len,
            "train": self.data.train_sha256,
            "loop.seed": loop.seed,
            "global_batch_size": self.loader(self.data.train).global_batch_size,
        }

    def loader(self, examples: Sequence[Example]) -> EncoderLoader:
        loop, topology = self.config.loop, self.topology
        return EncoderLoader(
            examples,
            self.data.tokenizer,
            micro_batch_size=loop.micro_batch_size,
            num_microbatches=compute_num_microbatches(loop, topology.dp_size),
            dp_size=topology.dp_size,
            dp_rank=topology.dp_rank,
            seed=loop.seed,
        )

    def answer(self, examples: Sequence[Example]) -> tuple[torch.Tensor, list[str]]:
        """The head's outputs [rows, labels], and what they say; every process calls it."""
        outputs = torch.stack(self.engine.predict(self.loader(examples).validation_batches()))
        words = self.data.labels.words
        return outputs, [words[int(row.argmax())] if words else f"{row.item():.4f}" for row in outputs]


def load_data(config: ClassifyConfig) -> Data:
    """The same on every process. ValueError with file and line for a bad row or an unknown label."""
    tokenizer, task, seq_len = open_tokenizer(config.encoder), config.task, config.encoder.seq_len
    bad = BadRows(task.references, "error", remedy="correct the row")
    scored = load_pairs("task.references", task, task.split, bad)
    bad = BadRows(config.train or "", config.on_bad_row, remedy="correct the row or set on_bad_row=skip")
    training = [] if config.train is None else load_pairs("train", task, config.train_split, bad)
    labels = _find_labels(config, training, scored)
    encode = partial(encode_examples, task=task, labels=labels, tokenizer=tokenizer, seq_len=seq_len)
    contexts, asked = load_unlabelled("predict", config.predict, task) if config.predict else ([], [])
    return Data(
        train=encode("train", config.train, training) if config.train else [],
        scored=encode("task.references", task.references, scored),
        items=load_items(task),
        asked=encode("predict", config.predict, asked, labelled=False) if config.predict else [],
        contexts=contexts,
        labels=labels,
        tokenizer=tokenizer,
        train_sha256=_hash_pairs(training),
        scored_sha256=_hash_pairs(scored),
        skipped=bad,
    )


def _find_labels(config: ClassifyConfig, training: Sequence[Pair], scored: Sequence[Pair]) -> Labels:
    """The trained head's own where nothing trains and it has names."""
    words, given = None if training else read_trained_labels(config), config.task.labels
    labels = find_label_words(config.task, training or scored) if words is None else Labels(words=words)
    if given is not None and labels.words != tuple(given):
        raise ValueError(f"task.labels={given}: the head's are {list(labels.words)}; leave task.labels out")
    return labels


def _hash_pairs(pairs: Sequence[Pair]) -> str:
    return hashlib.sha256(json.dumps([[pair.context, pair.target] for pair in pairs]).encode()).hexdigest()


def open_job(config: ClassifyConfig, topology: Topology, data: Data) -> Job:
    """The encoder with what trains on it inside ZeRO; begun from config.adapter where that is given."""
    dtype, seed = DTYPES[config.dtype], config.loop.seed
    encoder = open_encoder(config.encoder, num_labels=data.labels.num_outputs, dtype=dtype, seed=seed)
    encoder.model.to(topology.device)
    trainable = apply_encoder_method(encoder, config)
    fingerprint = run_on_first(topology, lambda: compute_base_fingerprint(encoder.shape, seed))
    if config.train is None and config.adapter is None:
        check_own_head(config, encoder, data.labels)
    if config.optim.label_smoothing and not data.labels.words:
        raise ValueError(f"optim.label_smoothing={config.optim.label_smoothing}: {config.task.name} has numbers; set 0")
    if config.adapter is not None:
        load_trained(encoder, config, data.labels.words, fingerprint)
    zero = build_zero_engine(
        encoder.model,
        trainable,
        zero=config.zero,
        optim=config.optim,
        micro_batch_size=config.loop.micro_batch_size,
        dtype=dtype,
        topology=topology,
    )
    smoothing = config.optim.label_smoothing
    engine = EncoderEngine(encoder.model, zero, trainable, topology, seed=seed, label_smoothing=smoothing)
    return Job(
        config=config, topology=topology, encoder=encoder, engine=engine, data=data, base_fingerprint=fingerprint
    )


def check_own_head(config: ClassifyConfig, encoder: Encoder, labels: Labels) -> None:
    """ValueError where nothing trains and the checkpoint cannot answer the task either."""
    own, wanted = encoder.head_labels, labels.words or ("LABEL_0",)
    if own is None:
        raise ValueError(
            f"train and adapter are null, and encoder.checkpoint={config.encoder.checkpoint} has no head for"
            f" {labels.num_outputs} labels; give train=FILE to train, or adapter=RUN to score what a run has learnt"
        )
    if own != wanted:
        raise ValueError(f"encoder.checkpoint={config.encoder.checkpoint}: its labels are {own}, the task's {wanted}")


def resume(job: Job) -> tuple[int, float | None]:
    """Steps done and the validation loss before them, from the newest checkpoint where config.resume asks for it."""
    config, topology = job.config, job.topology
    if config.resume == "none":
        return 0, None
    newest = run_on_first(topology, lambda: find_newest_checkpoint(config.run_dir))
    if newest is None:
        if config.resume == "must":
            raise ValueError(f"resume=must but {config.run_dir} holds no checkpoint; use resume=auto")
        return 0, None
    engine = job.engine
    content = load_checkpoint(
        newest, engine=engine.zero, trainable=engine.trainable, topology=topology, identity=job.describe()
    )
    state = content["state"]
    if state.get("scored", job.data.scored_sha256) != job.data.scored_sha256:
        raise ValueError(f"{newest}: that run was scored on other rows than task.references={config.task.references}")
    job.best.value = state.get("best")  # checkpoints of older versions have none
    return content["step"], state["valid_loss_before"]


def save(job: Job, step: int, valid_loss_before: float | None) -> None:
    save_checkpoint(
        job.config.run_dir,
        engine=job.engine.zero,
        trainable=job.engine.trainable,
        topology=job.topology,
        step=step,
        identity=job.describe(),
        state={"valid_loss_before": valid_loss_before, "best": job.best.value, "scored": job.data.scored_sha256},
        keep=job.config.loop.keep_checkpoints,
    )


def keep_best(job: Job, step: int, validation: Validation) -> None:
    """As `Keeper.keep_best`, by the first score of the task."""
    first = next(value for name, value in validation.items() if name != "valid_loss")
    if job.config.loop.keep_best and job.best.take(first):
        write(job, name_trained(job.config, best=True), step, validation)


def read_best(job: Job) -> dict[str, Any] | None:
    """Step and validation of what `keep_best` wrote; None where it wrote nothing."""
    directory = name_trained(job.config, best=True)
    if not directory.exists():
        return None
    manifest = read_manifest(directory)
    return {"step": manifest["step"], **manifest["metrics"]}


def write(job: Job, directory: Path, step: int, metrics: Validation) -> None:
    """What has been trained. Every process calls it; an older one is replaced once the new one is whole."""
    config, topology, trainable = job.config, job.topology, job.engine.trainable
    entries = list_whole(trainable, topology)
    stream = iterate_model(entries, trainable, topology, job.engine.zero.read_value, torch.float32)
    about = {
        "base_fingerprint": job.base_fingerprint,
        "labels": list(job.data.labels.words),
        "task": config.task.name,
        "step": step,
        "metrics": metrics,
    }

    def write_here() -> None:
        values = {key: whole for key, whole in stream if whole is not None}
        write_trained(directory, job.encoder, config, values, about)

    write_together(write_here if topology.global_rank == 0 else None, stream)
