"""The seam between the loop and the backends: Megatron's schedule inside ZeRO's step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_dist.batch import Batch
from lora_dist.gradients import (
    assert_every_gradient,
    check_replicas,
    sum_tied_embedding_gradients,
    sum_tp_partial_gradients,
)
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.parallel import seed_base_dropout
from lora_dist.mcore.schedule import Passes, evaluate_loss, forward_backward
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.zero.engine import ZeroEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step, the same on every process."""

    loss: float
    """Mean over the target tokens of the global batch, before the step."""
    grad_norm: float
    """True global norm before clipping; every parameter counted once."""
    skipped: bool
    """True where a gradient was not finite and nothing changed."""
    loss_scale: float
    stop_requested: bool
    """True where a signal has asked any process to stop."""


class Engine:
    """What the loop asks of a model that trains."""

    def __init__(
        self,
        gpt: ShardedGpt,
        zero: ZeroEngine,
        trainable: list[TrainableParameter],
        topology: Topology,
        *,
        seed: int,
        passes: Passes | None = None,
    ) -> None:
        """`passes` stands in for Megatron's schedule from the second step on: `mcore.graphs.MicrobatchGraphs`."""
        self.gpt, self.zero, self.trainable, self.topology, self.seed = gpt, zero, trainable, topology, seed
        self._passes, self._gradients_checked = passes, False

    def train_step(self, batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """Forward and backward over this replica's microbatches, then one optimizer step. All processes call it.

        RuntimeError in the first step if a trainable parameter got no gradient.
        """
        self.zero.set_lr(lr)
        if self.gpt.has_dropout:
            seed_base_dropout(self.topology, seed=self.seed, step=step)
        with self.zero.accumulate():
            loss, stop_requested = forward_backward(
                self.gpt,
                batches,
                seed=self.seed,
                step=step,
                scale_loss=self.zero.scale_loss,
                passes=self._passes if self._gradients_checked else None,
            )
            if not self._gradients_checked:
                assert_every_gradient(self.trainable)
                self._gradients_checked = True
            sum_tp_partial_gradients(self.trainable, self.topology)
            sum_tied_embedding_gradients(self.trainable, self.topology)
        loss_scale = self.zero.loss_scale
        outcome = self.zero.step()
        return StepResult(
            loss=loss,
            grad_norm=outcome.grad_norm,
            skipped=outcome.skipped,
            loss_scale=loss_scale,
            stop_requested=stop_requested,
        )

    def run_as_written(self) -> None:
        """From now on by Megatron's schedule, operation by operation, for what watches them."""
        self._passes = None

    def evaluate(self, global_batches: Iterable[Sequence[Batch]]) -> float:
        """Mean loss a target token over the whole split."""
        total, num_tokens = 0.0, 0
        for batches in global_batches:
            total += evaluate_loss(self.gpt, batches)
            num_tokens += batches[0].num_loss_tokens
        return total / max(1, num_tokens)

    def check_replicas(self) -> None:
        """RuntimeError where a factor that TP replicates is no longer bit-identical."""
        check_replicas(self.trainable, self.topology)
