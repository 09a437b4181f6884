"""Microbatches as recorded graphs: the device launches their kernels from a list, without Python's work for each.

A replay reads anew the tensors of its microbatch and the gradient that backward starts from, and adds to the gradients.
All else is as it was when it was recorded: shapes, Python's numbers, what was decided on the way.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from lora_dist.batch import Batch
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.parallel import leave_generators_alone
from lora_dist.mcore.schedule import Inputs, compute_loss_weight, prepare_inputs, run_forward
from lora_dist.parameters import TrainableParameter

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Takes down what a function does on the device, without doing it, and gives what does it."""

_TARGET_STEPS = 8
"""The number of target tokens is rounded up to a multiple of an eighth of all tokens, so that few graphs do."""


class CudaRecorder:
    """Records with CUDA graphs, which never run at once and so share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Another thread (NCCL's watchdog, the loader) may ask CUDA what this one may not while it records.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


@dataclass(kw_only=True, slots=True)
class _Graph:
    """Of one shape of microbatch: run as written the first time, recorded the second."""

    inputs: Inputs
    """Each microbatch is copied into these."""
    loss_sum: torch.Tensor
    replay: Replay | None = None


class MicrobatchGraphs:
    """Runs a step's forward and backward passes; for a model that is one pipeline stage and recomputes nothing."""

    def __init__(
        self,
        gpt: ShardedGpt,
        trainable: Sequence[TrainableParameter],
        read_loss_scale: Callable[[], float],
        record: Record,
    ) -> None:
        self._gpt, self._read_loss_scale, self._record = gpt, read_loss_scale, record
        self._parameters = [one.parameter for one in trainable]
        self._grads: list[torch.Tensor] = [torch.zeros_like(p) for p in self._parameters]
        self._dloss = torch.zeros((), dtype=torch.float64, device=gpt.topology.device)
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, batches: Sequence[Batch], *, seed: int, step: int) -> list[torch.Tensor]:
        """The microbatches' loss sums. Their gradients are in `.grad`, as Megatron's schedule leaves them."""
        torch._foreach_zero_(self._grads)
        self._dloss.fill_(compute_loss_weight(self._gpt, batches) / len(batches) * self._read_loss_scale())
        losses = [self._run_one(batch, seed=seed, step=step) for batch in batches]
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        return losses

    def _run_one(self, batch: Batch, *, seed: int, step: int) -> torch.Tensor:
        multiple = max(1, batch.input_ids_BS.numel() // _TARGET_STEPS)
        inputs = prepare_inputs(self._gpt, batch, seed=seed, step=step, target_multiple=multiple)
        graph = self._graphs.get(key := _describe(inputs))
        if graph is None:
            # Libraries choose their kernels and take their workspaces now, which must not happen in a recording.
            graph = self._graphs[key] = _Graph(inputs=_own(inputs), loss_sum=torch.zeros_like(self._dloss))
            self._forward_backward(graph)
            return graph.loss_sum.clone()
        for mine, new in zip(_list_tensors(graph.inputs), _list_tensors(inputs), strict=True):
            mine.copy_(new)
        graph.replay = graph.replay or self._record(partial(self._forward_backward, graph))
        graph.replay()
        return graph.loss_sum.clone()

    def _forward_backward(self, graph: _Graph) -> None:
        with leave_generators_alone():
            loss_sum = run_forward(self._gpt, graph.inputs, drops=True)
        grads = torch.autograd.grad(loss_sum, self._parameters, self._dloss.to(loss_sum.dtype))
        torch._foreach_add_(self._grads, grads)
        graph.loss_sum.copy_(loss_sum.detach())


def _list_tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [*_find_tensors(inputs.batch).values(), *_find_tensors(inputs).values()]


def _find_tensors(owner: Batch | Inputs) -> dict[str, torch.Tensor]:
    """Its own fields that are tensors."""
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _own(inputs: Inputs) -> Inputs:
    """Copies of its tensors that nothing else has and that can be written; a loader's rows may share positions."""
    return replace(inputs, batch=replace(inputs.batch, **_clone(inputs.batch)), **_clone(inputs))


def _clone(owner: Batch | Inputs) -> dict[str, Any]:
    plain = torch.contiguous_format
    return {name: tensor.clone(memory_format=plain) for name, tensor in _find_tensors(owner).items()}


def _describe(inputs: Inputs) -> Hashable:
    """What a graph is made for."""
    batch = inputs.batch
    given = inputs.block_ids_BS is not None, batch.slots_BS is not None
    return tuple(batch.input_ids_BS.shape), len(inputs.targets_N), batch.adapter_of_row, given
