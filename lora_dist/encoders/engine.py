"""What the loop asks of an encoder that trains: transformers' forward and backward inside ZeRO's step."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lora_dist.encoders.batches import EncoderBatch
from lora_dist.engine import StepResult
from lora_dist.gradients import assert_every_gradient
from lora_dist.lora.factors import derive_seed
from lora_dist.parameters import TrainableParameter
from lora_dist.stopping import is_stop_requested
from lora_dist.topology import Topology
from lora_dist.zero.engine import ZeroEngine


class EncoderEngine:
    """Data-parallel: every process has the whole model, or under ZeRO 3 its part of each weight."""

    def __init__(
        self,
        model: nn.Module,
        zero: ZeroEngine,
        trainable: list[TrainableParameter],
        topology: Topology,
        *,
        seed: int,
        label_smoothing: float = 0.0,
    ) -> None:
        self.model, self.zero, self.trainable, self.topology, self._seed = model, zero, trainable, topology, seed
        self._label_smoothing = label_smoothing
        self._gradients_checked = False

    def train_step(self, batches: Sequence[EncoderBatch], *, step: int, lr: float) -> StepResult:
        """As `engine.Engine.train_step`; the loss is the mean over the global batch's rows."""
        self.zero.set_lr(lr)
        self.model.train()
        torch.manual_seed(derive_seed(self._seed, "base dropout", step, self.topology.dp_rank))
        total = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        with self.zero.accumulate():
            for batch in batches:
                loss_sum = self._compute_loss_sum(batch)
                total[0] += loss_sum.detach()
                # ZeRO divides by dp_size
                self.zero.scale_loss(loss_sum * (self.topology.dp_size / batch.num_rows)).backward()
            if not self._gradients_checked:
                assert_every_gradient(self.trainable)
                self._gradients_checked = True
        total[1] = float(is_stop_requested())
        dist.all_reduce(total)
        loss_scale = self.zero.loss_scale
        outcome = self.zero.step()
        return StepResult(
            loss=total[0].item() / batches[0].num_rows,
            grad_norm=outcome.grad_norm,
            skipped=outcome.skipped,
            loss_scale=loss_scale,
            stop_requested=total[1].item() > 0.0,
        )

    def check_replicas(self) -> None:
        """Nothing is replicated over TP."""

    @torch.no_grad()
    def predict(self, global_batches: Iterable[Sequence[EncoderBatch]]) -> list[torch.Tensor]:
        """The head's outputs of every row, in the split's order, on every process."""
        self.model.eval()
        outputs: list[torch.Tensor] = []
        for batches in global_batches:
            mine = [self._compute_logits(batch).float().cpu() for batch in batches]
            parts: list[list[torch.Tensor]] = [[] for _ in range(self.topology.dp_size)]
            dist.all_gather_object(parts, mine, group=self.topology.zero_group)
            passes = [torch.cat(one_pass) for one_pass in zip(*parts, strict=True)]
            outputs.extend(torch.cat(passes)[: batches[0].num_rows])
        return outputs

    def _compute_logits(self, batch: EncoderBatch) -> torch.Tensor:
        inputs = {name: tensor.to(self.topology.device) for name, tensor in batch.inputs.items()}
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def _compute_loss_sum(self, batch: EncoderBatch) -> torch.Tensor:
        logits, device = self._compute_logits(batch).float(), self.topology.device
        losses_B = compute_losses(logits, batch.labels_B.to(device), label_smoothing=self._label_smoothing)
        return (losses_B * batch.counts_B.to(device)).sum()


def compute_losses(logits: torch.Tensor, labels_B: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """[B]: cross-entropy of logits [B, labels], or the squared error where the head has one output."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels_B, reduction="none")
    return F.cross_entropy(logits, labels_B.long(), reduction="none", label_smoothing=label_smoothing)
