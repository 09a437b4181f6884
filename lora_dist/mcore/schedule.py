"""One step's forward and backward passes over a shard, by Megatron's schedules (1F1B where there are stages)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from lora_dist.batch import Batch, RowBlocks, move, number_blocks
from lora_dist.lora.dropout import compute_row_keys
from lora_dist.mcore.attention import (
    LayerMasks,
    Mask,
    compute_attention_bias,
    compute_window_mask,
    compute_windowed_blocks,
)
from lora_dist.mcore.model import ShardedGpt
from lora_dist.stopping import is_stop_requested

ScaleLoss = Callable[[torch.Tensor], torch.Tensor]


class Passes(Protocol):
    """Runs a step's microbatches forward and backward, and returns their loss sums on the last stage."""

    def __call__(self, batches: Sequence[Batch], *, seed: int, step: int) -> list[torch.Tensor]: ...


def forward_backward(
    gpt: ShardedGpt,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    scale_loss: ScaleLoss | None,
    passes: Passes | None = None,
) -> tuple[float, bool]:
    """Run every microbatch; gradients accumulate in `.grad`, averaged so that a mean over DP gives the step's gradient.

    `passes` stands in for Megatron's schedule, and scales the loss itself. Returns the mean loss a target token of the
    global batch, and whether any process was asked to stop: both the same on every process.
    """
    gpt.train()
    gpt.config.grad_scale_func = scale_loss
    if passes is None:
        losses = _run_schedule(gpt, batches, seed=seed, step=step, forward_only=False)
    else:
        losses = passes(batches, seed=seed, step=step)
    loss_sum, stop_requested = _sum_over_processes(gpt, losses)
    return loss_sum / max(1, batches[0].num_loss_tokens), stop_requested


@torch.no_grad()
def evaluate_loss(gpt: ShardedGpt, batches: Sequence[Batch]) -> float:
    """Loss summed over the target tokens of one global batch, the same on every process; no dropout, no smoothing."""
    gpt.eval()
    loss_sum, _ = _sum_over_processes(gpt, _run_schedule(gpt, batches, seed=0, step=0, forward_only=True))
    return loss_sum


def _run_schedule(
    gpt: ShardedGpt, batches: Sequence[Batch], *, seed: int, step: int, forward_only: bool
) -> list[torch.Tensor]:
    """Loss sums of this stage's microbatches; empty on all but the last stage."""
    weight = compute_loss_weight(gpt, batches)

    def loss_function(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The schedule divides by the number of microbatches, and multiplies by cp_size.
        return loss_sum * (weight / gpt.topology.cp_size), loss_sum.detach()

    def forward_step(iterator: "object", _stage: ShardedGpt) -> tuple[torch.Tensor, Callable]:
        batch: Batch = next(iterator)  # type: ignore[call-overload]
        inputs = prepare_inputs(gpt, batch, seed=seed, step=step)
        return run_forward(gpt, inputs, drops=not forward_only), loss_function

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[gpt],
        num_microbatches=len(batches),
        seq_length=batches[0].seq_len,  # of whole rows: the schedule divides by cp_size
        micro_batch_size=batches[0].input_ids_BS.shape[0],
        forward_only=forward_only,
    )


def compute_loss_weight(gpt: ShardedGpt, batches: Sequence[Batch]) -> float:
    """Makes a microbatch's loss sum what a mean over microbatches and ZeRO's processes turns into the global batch's
    mean.
    """
    return len(batches) * gpt.topology.zero_size / max(1, batches[0].num_loss_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A microbatch on the device: all that the forward pass reads of it."""

    batch: Batch
    targets_N: torch.Tensor
    """Of `Batch.find_targets`."""
    row_keys_B: torch.Tensor
    """Of `compute_row_keys`."""
    block_ids_BS: torch.Tensor | None
    """Of `number_blocks`, for packed rows that do not attend in blocks."""


def prepare_inputs(gpt: ShardedGpt, batch: Batch, *, seed: int, step: int, target_multiple: int = 1) -> Inputs:
    """This process's part of the rows. What depends on values is worked out on the host, which need not wait for the
    device then.
    """
    device, block_ids_BS = gpt.topology.device, None
    batch = batch.cut(gpt.topology.row_shard)
    if batch.row_blocks is not None and _needs_bias(gpt, batch.row_blocks):
        block_ids_BS = move(number_blocks(batch.row_blocks), device)
    return Inputs(
        batch=batch.to(device),
        targets_N=move(batch.find_targets(target_multiple), device),
        row_keys_B=move(compute_row_keys(batch.row_ids_B, seed=seed, step=step), device),
        block_ids_BS=block_ids_BS,
    )


def _needs_bias(gpt: ShardedGpt, row_blocks: RowBlocks) -> bool:
    """Whether packed rows cannot attend block by block: they are not to, or whole rows draw the dropout of layers whose
    window is shorter than a block.
    """
    window, drops = gpt.model.sliding_window, gpt.config.attention_dropout > 0
    return not gpt.attends_in_blocks or (drops and window is not None and max(map(max, row_blocks)) > window)


def _build_mask(gpt: ShardedGpt, inputs: Inputs) -> Mask | LayerMasks:
    """Whatever the blocks are: a recording is repeated with others."""
    row_blocks, window, dtype = inputs.batch.row_blocks, gpt.model.sliding_window, gpt.config.params_dtype
    if inputs.block_ids_BS is None:
        if row_blocks is None or window is None or gpt.topology.cp_size > 1:  # attention over processes knows it itself
            return row_blocks
        return LayerMasks(
            full=row_blocks, windowed=compute_windowed_blocks(row_blocks, dtype, window, gpt.topology.device)
        )
    build_bias = partial(compute_attention_bias, inputs.block_ids_BS, dtype)
    if gpt.model.architecture.delta_layers:
        return LayerMasks(full=build_bias(), windowed=None, recurrent=row_blocks)
    if window is None or window >= inputs.batch.seq_len:
        return build_bias()
    full = row_blocks if gpt.attends_in_blocks or not gpt.model.full_attention_layers else build_bias()
    drops = gpt.config.attention_dropout > 0
    return LayerMasks(full=full, windowed=compute_window_mask(inputs.block_ids_BS, dtype, window, drops=drops))


def run_forward(gpt: ShardedGpt, inputs: Inputs, *, drops: bool) -> torch.Tensor:
    """This stage's output: on the last one the loss summed over the target tokens."""
    batch = inputs.batch
    gpt.clock.row_keys_B = inputs.row_keys_B if drops else None
    gpt.clock.adapter_of_row = batch.adapter_of_row
    gpt.slots_BS = batch.slots_BS
    output: torch.Tensor = gpt(
        batch.input_ids_BS,
        batch.position_ids_BS,
        _build_mask(gpt, inputs),
        labels=batch.labels_BS,
        loss_mask=inputs.targets_N,
    )
    return output


def _sum_over_processes(gpt: ShardedGpt, losses: list[torch.Tensor]) -> tuple[float, bool]:
    """Sum over microbatches, replicas and parts of rows, each counted once, told to every process; whether any was
    asked to stop.
    """
    total = torch.zeros(2, dtype=torch.float64, device=gpt.topology.device)
    if gpt.topology.tp_rank == 0 and losses:
        total[0] = torch.stack(losses).double().sum()
    if is_stop_requested():
        total[1] = 1.0
    dist.all_reduce(total)
    return total[0].item(), total[1].item() > 0.0
