"""What a run leaves behind while it trains: resume checkpoints, the best so far, and what is handed on at the end."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dist.checkpoint.adapter import write_adapter
from lora_dist.checkpoint.identity import describe_method, describe_run
from lora_dist.checkpoint.method_store import write_method
from lora_dist.checkpoint.resume import find_newest_checkpoint, load_checkpoint, save_checkpoint
from lora_dist.config import RunConfig
from lora_dist.data.loader import Loaders
from lora_dist.engine import Engine
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.mcore.hf_weights import write_hf_checkpoint
from lora_dist.methods import AppliedMethod
from lora_dist.run_dir import name_trained
from lora_dist.topology import Topology, run_on_first
from lora_dist.validation import Best, Validation

_STALE = (
    "{}: full fine-tuning trains no indexer; those in it are the base's, and pick what is attended to in contexts"
    " longer than model.attended_positions"
)


@dataclass(kw_only=True, slots=True)
class Keeper:
    """Writes what a run leaves behind: resume checkpoints, and the adapter or the fine-tuned model."""

    config: RunConfig
    topology: Topology
    engine: Engine
    method: AppliedMethod
    base_fingerprint: str
    identity: dict[str, Any]
    num_steps_done: int = 0
    valid_loss_before: float | None = None
    best: Best = field(default_factory=lambda: Best(highest=False))

    def save(self, num_steps: int, valid_loss_before: float | None) -> None:
        """The state after `num_steps` steps. Every process calls it."""
        save_checkpoint(
            self.config.run_dir,
            engine=self.engine.zero,
            trainable=self.engine.trainable,
            topology=self.topology,
            step=num_steps,
            identity=self.identity,
            state={"valid_loss_before": valid_loss_before, "best": self.best.value},
            keep=self.config.loop.keep_checkpoints,
        )

    def keep_best(self, num_steps: int, validation: Validation) -> None:
        """Where config.loop.keep_best asks for it, `best_adapter/` or `best_model/` is the best so far."""
        if self.config.loop.keep_best and self.best.take(validation["valid_loss"]):
            self.write_model(name_trained(self.config, best=True), num_steps, validation)

    def write_model(self, directory: Path, num_steps: int, metrics: Validation) -> None:
        """LoRA's adapter in PEFT's format, a model in Hugging Face's.

        Every process calls it; an older one is replaced once the new one is whole.
        """
        read = self.engine.zero.read_value
        if self.config.method == "full":
            write_hf_checkpoint(self.engine.gpt, directory, model=self.config.model, read=read)
            if self.config.model.architecture.sparse_attention:
                run_on_first(self.topology, lambda: print(_STALE.format(directory), file=sys.stderr, flush=True))
            return
        if self.config.method != "lora":
            write_method(
                directory,
                options=describe_method(self.config),
                trainable=self.engine.trainable,
                topology=self.topology,
                model=self.config.model,
                read=read,
                about={
                    "base_fingerprint": self.base_fingerprint,
                    "task": self.config.data.name,
                    "step": num_steps,
                    "metrics": metrics,
                },
            )
            return
        write_adapter(
            directory,
            trainable=self.engine.trainable,
            specs=self.method.specs,
            constants=self.method.constants,
            modules=self.config.lora.modules_to_save,
            topology=self.topology,
            model=self.config.model,
            bias=self.config.lora.bias,
            read=read,
            base_fingerprint=self.base_fingerprint,
            task=self.config.data.name,
            step=num_steps,
            metrics=metrics,
        )

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, where there is one. ValueError where it is another run's."""
        newest = run_on_first(self.topology, lambda: find_newest_checkpoint(self.config.run_dir))
        if newest is None:
            if self.config.resume == "must":
                raise ValueError(f"resume=must but {self.config.run_dir} holds no checkpoint; use resume=auto")
            return
        content = load_checkpoint(
            newest,
            engine=self.engine.zero,
            trainable=self.engine.trainable,
            topology=self.topology,
            identity=self.identity,
        )
        self.num_steps_done = content["step"]
        self.valid_loss_before = content["state"]["valid_loss_before"]
        self.best.value = content["state"].get("best")  # checkpoints of older versions have none


def open_keeper(
    config: RunConfig, topology: Topology, engine: Engine, method: AppliedMethod, loaders: Loaders
) -> Keeper:
    """The keeper of this run, its state restored where `config.resume` asks for that."""
    fingerprint = run_on_first(topology, lambda: compute_base_fingerprint(config.model, config.loop.seed))
    hashes = {split: file.sha256 for split, file in loaders.report.files.items()}
    data: dict[str, Any] = {**hashes, "num_train_examples": loaders.report.num_train_examples}
    if config.data.leaves_text_open:
        data["tokens"] = loaders.train.hash_examples()
    identity = describe_run(
        config,
        method.specs,
        base_fingerprint=fingerprint,
        data_hashes=data,
        dp_size=topology.dp_size,
    )
    keeper = Keeper(
        config=config,
        topology=topology,
        engine=engine,
        method=method,
        base_fingerprint=fingerprint,
        identity=identity,
    )
    if config.resume != "none":
        keeper.resume()
    return keeper
