"""Stand-ins for what DeepSpeed asks of other processes and of torch's meta device, for a process alone with fakes."""

import os
import types
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero import utils as ds_zero_utils
from torch.utils._python_dispatch import _disable_current_modes


class _TorchBesideFakes(types.ModuleType):
    """`torch` for one module. Fake tensors are on the meta device too, and stand for memory; what the module itself
    puts there, to keep shapes, stands for none: those who count fakes must not see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros_like(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("device") != "meta":  # as it is written, where a fake's own device is a torch.device
            return torch.zeros_like(tensor, **options)
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            return torch.zeros_like(tensor, **options)


@cache
def use_fake_stand_ins() -> None:
    """For the rest of this process, which does nothing else."""
    os.environ.setdefault("LOCAL_RANK", "0")
    stage_1_and_2.torch = _TorchBesideFakes("torch")
    # ZeRO 3 compares lists of numbers between processes, of which there is one here: it sends, and believes its own.
    send_list, compare_length = ds_zero_utils.get_lst_from_rank0, ds_zero_utils.assert_lst_len_same_as_other_ranks

    def get_list(numbers: list[int]) -> list[int]:
        send_list(numbers)
        return numbers

    def compare(numbers: list[int]) -> None:
        with suppress(RuntimeError):  # the answer to every number is zero
            compare_length(numbers)

    ds_zero_utils.get_lst_from_rank0, ds_zero_utils.assert_lst_len_same_as_other_ranks = get_list, compare
