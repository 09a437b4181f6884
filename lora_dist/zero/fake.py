"""Stand-ins for what DeepSpeed asks of other processes and of real memory, so that its code runs on fake tensors."""

import os

import torch
from deepspeed.runtime.zero import utils as ds_zero_utils


def use_fake_stand_ins() -> None:
    """For the rest of this process, which does nothing else."""
    os.environ.setdefault("LOCAL_RANK", "0")
    # ZeRO 3 compares lists of numbers between processes, of which there is one here.
    ds_zero_utils.get_lst_from_rank0 = lambda numbers: numbers
    ds_zero_utils.assert_lst_len_same_as_other_ranks = lambda numbers: None
    # Module.to() wants to swap fake parameters, which it refuses because they are referred to weakly.
    torch.utils.swap_tensors = _assign


def _assign(parameter: torch.Tensor, converted: torch.Tensor) -> None:
    parameter.data = converted.data
