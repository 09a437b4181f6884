"""Stand-ins for what DeepSpeed asks of other processes, so that it runs in one that has none."""

import os
from contextlib import suppress
from functools import cache

from deepspeed.runtime.zero import utils as ds_zero_utils


@cache
def use_fake_stand_ins() -> None:
    """For the rest of this process, which does nothing else."""
    os.environ.setdefault("LOCAL_RANK", "0")
    # ZeRO 3 compares lists of numbers between processes, of which there is one here: it sends, and believes its own.
    send_list, compare_length = ds_zero_utils.get_lst_from_rank0, ds_zero_utils.assert_lst_len_same_as_other_ranks

    def get_list(numbers: list[int]) -> list[int]:
        send_list(numbers)
        return numbers

    def compare(numbers: list[int]) -> None:
        with suppress(RuntimeError):  # the answer to every number is zero
            compare_length(numbers)

    ds_zero_utils.get_lst_from_rank0, ds_zero_utils.assert_lst_len_same_as_other_ranks = get_list, compare
