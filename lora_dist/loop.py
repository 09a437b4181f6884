"""The training loop: steps, validation, checkpoints. Measuring is called here, not written here."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lora_dist.claim import Claim
from lora_dist.config import LoopConfig, OptimConfig
from lora_dist.engine import StepResult
from lora_dist.measure.meter import Meter
from lora_dist.optim import compute_lr
from lora_dist.validation import Validate, Validation

Observe = Callable[[dict[str, float | int | bool | None]], None]
"""Takes one step's metrics; called on every process, acts where it has something to write."""


class AnyBatch(Protocol):
    """What the meter counts of a microbatch: its whole global batch's."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_loss_tokens(self) -> int: ...


_Batch = TypeVar("_Batch", bound=AnyBatch)
_Taken = TypeVar("_Taken", bound=AnyBatch, contravariant=True)


class Trained(Protocol[_Taken]):
    """What the loop asks of a model that trains: `engine.Engine`, or an encoder's."""

    def train_step(self, batches: Sequence[_Taken], *, step: int, lr: float) -> StepResult: ...
    def check_replicas(self) -> None: ...


class Source(Protocol[_Batch]):
    """Where batches come from, each a pure function of the step."""

    def batches_at(self, step: int) -> list[_Batch]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What the report needs of the loop."""

    valid_loss_before: float | None
    valid_loss_after: float | None
    num_steps_done: int
    """Fewer than `loop.num_steps` where a signal asked the run to stop; these are saved."""


def train_loop(
    engine: Trained[_Batch],
    train_loader: Source[_Batch],
    *,
    validate: Validate,
    loop: LoopConfig,
    optim: OptimConfig,
    first_step: int,
    meter: Meter,
    open_probe: Callable[[], AbstractContextManager[object]],
    observe: Observe,
    claim: Claim,
    save: Callable[[int, float | None], None],
    keep_best: Callable[[int, Validation], None],
    valid_loss_before: float | None,
) -> TrainResult:
    """Steps `first_step` to `loop.num_steps`; `save(n, valid_loss_before)` after n steps, the last one included.

    `keep_best(n, validation)` gets every validation of a step, ahead of that step's `save`. The loop ends early, its
    last step saved, where a signal asks any process to stop; with a ValueError and nothing of its last step written
    where `claim` is no longer held.

    `open_probe` looks closely at the first of these steps, which is slower for it.
    """
    validation: Validation = {}
    done = first_step
    if first_step == 0:
        validation = validate()
        valid_loss_before = validation.get("valid_loss")
        observe({"step": 0, "valid_loss": None, **validation})
    for step in range(first_step, loop.total_steps):
        claim.look()
        batches = train_loader.batches_at(step)
        lr = compute_lr(optim, step=step, num_steps=loop.total_steps)
        probe = open_probe() if step == first_step else nullcontext()
        with meter.step(num_tokens=batches[0].num_tokens, num_loss_tokens=batches[0].num_loss_tokens), probe:
            result = engine.train_step(batches, step=step, lr=lr)
        if result.stop_requested:
            claim.confirm()
        done = step + 1
        if _is_due(done, loop.check_replicas_every):
            engine.check_replicas()
        is_last = done == loop.total_steps
        validation = validate() if is_last or _is_due(done, loop.eval_every) else {}
        observe(_describe_step(done, result, lr) | validation)
        if validation:
            keep_best(done, validation)
        if is_last or result.stop_requested or _is_due(done, loop.save_every):
            save(done, valid_loss_before)
        if result.stop_requested:
            break
    if first_step >= loop.total_steps:
        validation = validate()
    valid_loss = validation.get("valid_loss")
    return TrainResult(valid_loss_before=valid_loss_before, valid_loss_after=valid_loss, num_steps_done=done)


def _is_due(num_steps_done: int, every: int) -> bool:
    return every > 0 and num_steps_done % every == 0


def _describe_step(done: int, result: StepResult, lr: float) -> dict[str, float | int | bool | None]:
    return {
        "step": done,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "skipped": result.skipped,
        "loss_scale": result.loss_scale,
    }
