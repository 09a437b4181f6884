"""Import others' code without torch's compiler, which takes seconds to load, and a job's every process would wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """Functions that a module wraps in `torch.compile` as it is imported stay as they are written."""
    compile_function = torch.compile
    torch.compile = _keep  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _keep(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    return function if function is not None else lambda wrapped: wrapped
