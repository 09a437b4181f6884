"""A GPU whose memory is full ends a job in one line: what is held there, what more was wanted, what would hold less."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lora_dist.config import LoopConfig, RunConfig
from lora_dist.measure.report_table import format_bytes

ON_MORE_GPUS = "a larger topology.tp_size or pp_size"


@contextmanager
def explain_out_of_memory(device: torch.device, remedies: Sequence[str]) -> Iterator[None]:
    """ValueError in the place of torch's own error, whose text names no key of a configuration."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{_describe(device, error)}. Less is held with {_join(remedies)}") from error


def list_remedies(config: RunConfig) -> list[str]:
    """What makes a training job's processes hold less, the cheapest first; nothing that would be refused in turn."""
    remedies = halve_micro_batch(config.loop)
    if config.loop.recompute != "full" and _allows(config, loop=replace(config.loop, recompute="full")):
        remedies.append(f"loop.recompute=full (is {config.loop.recompute})")
    if config.method == "full":
        remedies.append("zero.offload_optimizer=true, or a higher zero.stage over more replicas")
    elif config.model.base_format == "native" and _allows(config, model=replace(config.model, base_format="nf4")):
        remedies.append("model.base_format=nf4")
    return [*remedies, f"{ON_MORE_GPUS}; `lora-dist plan` with the same words says what takes how much"]


def halve_micro_batch(loop: LoopConfig) -> list[str]:
    """Or, of an odd number of rows, one: what still divides the global batch. Nothing where there is one."""
    size = loop.micro_batch_size
    return [f"loop.micro_batch_size={size // 2 if size % 2 == 0 else 1} (is {size})"] if size > 1 else []


def _allows(config: RunConfig, **changes: Any) -> bool:
    """Whether the rules between a configuration's parts let these be changed."""
    try:
        replace(config, **changes)
    except ValueError:
        return False
    return True


def _describe(device: torch.device, error: torch.OutOfMemoryError) -> str:
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f"{wanted[1]} more were" if wanted else "more was"
    return (
        f"{torch.cuda.get_device_name(device)} {device.index} ({format_bytes(total)}) is out of memory: {more} wanted,"
        f" tensors hold {format_bytes(held)}, torch's allocator keeps {format_bytes(reserved - held)} in pieces,"
        f" {format_bytes(free)} are free"
    )


def _join(remedies: Sequence[str]) -> str:
    *others, last = remedies
    return f"{', '.join(others)}, or {last}" if others else last
