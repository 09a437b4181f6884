"""Answers for the few operations whose result depends on values, which fake tensors do not have."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class Answers(TorchDispatchMode):
    """Makes a step take the path of a good one.

    A number read off a tensor is 0 (losses, norms, counts of bad gradients) but for Adam's step counts, which are 1;
    `nonzero` finds `num_targets` elements; random numbers need no generator.
    """

    def __init__(self, num_targets: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_targets = num_targets
        self._step_counts: set[int] = set()

    def know_step_counts(self, counts: Iterable[torch.Tensor]) -> None:
        self._step_counts = {count.untyped_storage()._cdata for count in counts}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return 1.0 if args[0].untyped_storage()._cdata in self._step_counts else 0.0
        if func is _aten.nonzero.default:
            return args[0].new_empty((self._num_targets, args[0].ndim), dtype=torch.int64)
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        return func(*args, **kwargs)
