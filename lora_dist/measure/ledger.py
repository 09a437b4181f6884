"""Where this process's bytes are: weights, gradients, optimizer state and saved activations, by tensor storage.

Everything is read off the real objects. A storage that several tensors share is counted once, whole, with the padding
it may have; it belongs to the first of the lines below that holds it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lora_dist.parameters import TrainableParameter


class HasAdam(Protocol):
    """The partitioned optimizer as far as the ledger looks at it (`lora_dist.zero.engine.ZeroEngine`)."""

    @property
    def adam(self) -> torch.optim.AdamW: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticLedger:
    """Bytes of one process that live through the whole run."""

    trainable_weight_bytes: int
    """Adapters and trained biases, or the whole shard in full fine-tuning, in the dtype the model computes from."""
    frozen_weight_bytes: int
    optimizer_state_bytes: int
    """Adam's moments and step counts, and fp32 masters where they are not the trainable weights themselves."""


@dataclass(slots=True)
class StepLedger:
    """Bytes that come and go within a step; complete once the context that made it has closed."""

    gradient_bytes: int = 0
    """Gradients of trainable parameters, all held at once when the step's last backward ends."""
    activation_bytes: int = 0
    """Peak of what autograd keeps for backward, over microbatches and pipeline stages in flight; no parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """One process's whole account."""

    static: StaticLedger
    step: StepLedger

    @property
    def total_bytes(self) -> int:
        static, step = self.static, self.step
        return (
            static.trainable_weight_bytes
            + static.frozen_weight_bytes
            + static.optimizer_state_bytes
            + step.gradient_bytes
            + step.activation_bytes
        )


def measure_static(gpt: nn.Module, trainable: Sequence[TrainableParameter], zero: HasAdam) -> StaticLedger:
    """Weights and optimizer state as they lie in memory now; between steps, not inside one."""
    counted: set[int] = set()
    return StaticLedger(
        trainable_weight_bytes=_count_new(map(_resident, (one.parameter for one in trainable)), counted),
        frozen_weight_bytes=_count_new([*map(_resident, gpt.parameters()), *gpt.buffers()], counted),
        optimizer_state_bytes=_count_new(_iterate_optimizer_tensors(zero.adam), counted),
    )


def _resident(parameter: Any) -> torch.Tensor:
    """ZeRO 3 keeps this process's slice beside the parameter, which is empty between uses."""
    slice_: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return slice_


def _iterate_optimizer_tensors(adam: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for master, state in adam.state.items():
        yield master
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storage_key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _count_new(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Bytes of the storages not in `counted` yet; adds them to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total


@contextmanager
def open_step_ledger(gpt: nn.Module, trainable: Sequence[TrainableParameter]) -> Iterator[StepLedger]:
    """Around one training step (or one forward and backward): what its gradients and saved activations take.

    Slows the step down a little; do not time it. Recomputation is seen as it happens: what a recomputed region saves
    counts while its own backward runs (for reentrant checkpointing, which Megatron's is). Sees what autograd saves, not
    what a custom function keeps in other attributes.
    """
    ledger = StepLedger()
    parameters = [one.parameter for one in trainable]
    gradients: dict[int, tuple[int, int]] = {}

    def note_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            gradients[id(parameter)] = _storage_key(parameter.grad), parameter.grad.untyped_storage().nbytes()

    handles = [parameter.register_post_accumulate_grad_hook(note_gradient) for parameter in parameters]
    try:
        with open_activation_ledger(gpt.parameters) as activations:
            yield ledger
    finally:
        for handle in handles:
            handle.remove()
    ledger.gradient_bytes = sum(dict(gradients.values()).values())  # stacked factors' gradients share a storage
    ledger.activation_bytes = activations.peak_bytes


class ActivationLedger:
    """Storages that autograd holds for backward: how many bytes now, and at most so far."""

    def __init__(self, get_parameters: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._get_parameters = get_parameters
        self._num_uses: dict[int, int] = {}
        self.current_bytes = 0
        self.peak_bytes = 0

    def hold(self, tensor: torch.Tensor) -> "_Saved":
        saved = _Saved(tensor.detach())  # an output that held on to its own graph would never be freed
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._num_uses:
            # Asked each time: ZeRO 3 gathers parameters into new storages.
            if any(_storage_key(parameter) == key for parameter in self._get_parameters()):
                return saved
            self._num_uses[key] = 0
            self.current_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        self._num_uses[key] += 1
        # The node that saved it drops `saved` when its backward is over, or when the graph dies.
        weakref.finalize(saved, self._release, key, size).atexit = False
        return saved

    def _release(self, key: int, size: int) -> None:
        self._num_uses[key] -= 1
        if self._num_uses[key] == 0:
            del self._num_uses[key]
            self.current_bytes -= size


class _Saved:
    """Keeps a tensor, and with it its storage's identity, for as long as autograd does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor


@contextmanager
def open_activation_ledger(
    get_parameters: Callable[[], Iterable[torch.Tensor]] = tuple,
) -> Iterator[ActivationLedger]:
    """Count what autograd saves within; the storages of `get_parameters()` are left out."""
    ledger = ActivationLedger(get_parameters)
    with torch.autograd.graph.saved_tensors_hooks(ledger.hold, _unpack):
        yield ledger
