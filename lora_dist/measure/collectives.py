"""Counts the collectives and messages that torch really issues, forward and backward: which, where and how large."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dist.topology import Topology

_OPS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
"""One name for the many forms of an operation; a coalesced call is one call."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Collective:
    """One kind of call, as often as `count` says."""

    op: str
    group: str
    """tp, pp, dp, tp_x_pp (one replica), embedding, world, or the group's own description."""
    in_layer: bool
    """Issued by a transformer layer, in its forward, recomputation or backward."""
    payload_bytes: int
    """The larger of what goes in and what comes out on this process, in one call."""
    count: int


class CollectiveCounter:
    """What was counted so far; complete once its context has closed."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, bool, int]] = Counter()
        self._layer_depth = 0

    def add(self, op: str, group: str, payload_bytes: int) -> None:
        self._counts[op, group, self._layer_depth > 0, payload_bytes] += 1

    def read(self) -> list[Collective]:
        """Every kind of call, sorted; each a dataclass of plain values."""
        return sorted(
            Collective(op=op, group=group, in_layer=in_layer, payload_bytes=payload_bytes, count=count)
            for (op, group, in_layer, payload_bytes), count in self._counts.items()
        )

    def watch(self, layer: nn.Module) -> list[Any]:
        """Know when `layer` runs, forward and backward. Returns the handles to remove."""

        def before_forward(_layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._layer_depth += 1
            hidden = _find_tensor([*args, *options.values()])
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(self._leave_backward)

        def after_forward(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._layer_depth -= 1
            hidden = _find_tensor(output if isinstance(output, tuple) else [output])
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(self._enter_backward)

        return [
            layer.register_forward_pre_hook(before_forward, with_kwargs=True),
            layer.register_forward_hook(after_forward),
        ]

    def _enter_backward(self, _gradient: torch.Tensor) -> None:
        self._layer_depth += 1
        # The lowest layer that trains passes no gradient on, so nothing else says that it is done.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _leave_backward(self, _gradient: torch.Tensor) -> None:
        self._layer_depth -= 1

    def _end_backward(self) -> None:
        self._layer_depth = 0


def _find_tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """The hidden states: the first floating-point tensor."""
    return next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)


@contextmanager
def count_collectives(topology: Topology, layers: Sequence[nn.Module] = ()) -> Iterator[CollectiveCounter]:
    """Count within, on this process; calls inside `layers` are marked as theirs. Slows down what it watches."""
    counter = CollectiveCounter()
    with ExitStack() as stack:
        for layer in layers:
            for handle in counter.watch(layer):
                stack.callback(handle.remove)
        stack.enter_context(_CountingMode(counter, _name_groups(topology)))
        yield counter


class _CountingMode(TorchDispatchMode):
    """Every collective of torch.distributed passes the dispatcher, whoever calls it, also from within backward."""

    def __init__(self, counter: CollectiveCounter, group_names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter, self._group_names = counter, group_names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.namespace != "_c10d_functional", f"{func} is not counted"
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name in _OPS:
                self._counter.add(_OPS[name], self._name_group(args), 0 if _OPS[name] == "barrier" else _payload(args))
        return func(*args, **(kwargs or {}))

    def _name_group(self, args: tuple[Any, ...]) -> str:
        group = dist.ProcessGroup.unbox(next(arg for arg in args if _is_group(arg)))
        return self._group_names.get(group.group_name, group.group_desc)


def _is_group(arg: Any) -> bool:
    return isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())


def _payload(args: tuple[Any, ...]) -> int:
    return max(_count_bytes(arg) for arg in args if isinstance(arg, torch.Tensor | list))


def _count_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_count_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _name_groups(topology: Topology) -> dict[str, str]:
    """Short names by torch's own; where one group serves two axes, the first named here."""
    assert dist.group.WORLD is not None
    named = [
        ("tp", topology.tp_group),
        ("pp", topology.pp_group),
        ("cp", topology.cp_group),
        ("dp", topology.zero_group),
        ("tp_x_pp", topology.model_parallel_group),
        ("embedding", topology.embedding_group),
        ("world", dist.group.WORLD),
    ]
    return {group.group_name: name for name, group in reversed(named) if group is not None}


def compute_count_per_layer(
    collectives: Sequence[Collective], *, group: str, num_layers: int, num_microbatches: int
) -> float:
    """Calls on `group` that one transformer layer issues in the forward and backward of one microbatch, on average."""
    in_layers = sum(one.count for one in collectives if one.in_layer and one.group == group)
    return in_layers / (num_layers * num_microbatches)
