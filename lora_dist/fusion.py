"""Chains of elementwise work as one kernel each: they run as written, or compiled where a process asks for it.

Written, every operation of a chain reads and writes its tensors in memory; torch.compile makes one pass of them. The
products around the chains are left to their libraries, and collectives stay outside.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Chain(Generic[_Arguments, _Result]):
    """A pure function of tensors, but for what it says that it overwrites."""

    compiles = False
    """For all chains of the process."""

    def __init__(
        self, function: Callable[_Arguments, _Result], *, compiled: Callable[_Arguments, _Result] | None = None
    ) -> None:
        """`compiled` is a form of `function` that the compiler makes more of: joined halves, where `function` writes
        each into its place, which saves a pass as long as nothing is compiled.
        """
        self.written, self._to_compile = function, compiled or function

    def __call__(self, *args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        return (self.compiled if Chain.compiles else self.written)(*args, **options)

    @cached_property
    def compiled(self) -> Callable[_Arguments, _Result]:
        """Made at the first call: torch's compiler takes seconds to load."""
        return torch.compile(self._to_compile)


def compile_chains(compiles: bool, device: torch.device) -> None:
    """From now on in this process. ValueError where torch has no compiler for the device."""
    Chain.compiles = compiles
    if compiles:
        _try_compiler(device)


@Chain
def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _try_compiler(device: torch.device) -> None:
    """At once, and not in the first step."""
    try:
        _double(torch.ones(1, device=device))
    except _list_compiler_errors() as error:
        needed = "Triton, and a GPU that it knows" if device.type == "cuda" else "a C++ compiler, e.g. g++"
        raise ValueError(f"compile=true needs {needed}: {str(error).splitlines()[0]}; set compile=false") from None


def _list_compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
    from torch._inductor.exc import InductorError

    errors: tuple[Any, ...] = (BackendCompilerFailed, TorchDynamoException, InductorError)
    return errors
