"""Optimizer state as whole tensors of one TP shard, whatever the stage: made at start-up, read, written.

Stage 0 keeps Adam's state beside each parameter; stages 1 and 2 in flat partitions over DP, with fp32 masters beside
them; stage 3 in flat partitions made of each parameter's own slices. Files never depend on which.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KEYS = ("value", *MOMENTS)
"""What resuming one parameter takes, each fp32 in the shape of its TP shard."""


def _fragments() -> Any:
    """DeepSpeed's access to what it has partitioned; imported late, since it picks its accelerator on import."""
    import deepspeed

    return deepspeed.utils


def iterate_partitions(ds_optimizer: Any, stage: int) -> Iterable[torch.Tensor]:
    """The tensors that Adam steps on this process: parameters at stage 0, flat fp32 partitions above."""
    if stage == 0:
        return [parameter for group in ds_optimizer.param_groups for parameter in group["params"]]
    if stage == 3:
        return list(ds_optimizer.fp32_partitioned_groups_flat)
    return list(ds_optimizer.single_partition_of_fp32_groups)


def materialize_adam_state(ds_optimizer: Any, adam: torch.optim.AdamW, stage: int) -> None:
    """Make the zero moments that AdamW would make in its first step, so that they can be counted and loaded before."""
    for partition in iterate_partitions(ds_optimizer, stage):
        state = adam.state[partition]
        assert not state, "Adam has already stepped"
        state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)  # where fused AdamW looks for it
        for key in MOMENTS:
            state[key] = torch.zeros_like(partition, memory_format=torch.preserve_format)
    if stage in (1, 2):
        ds_optimizer._lazy_init_hp_params_optimizer_state()


def iterate_step_counters(ds_optimizer: Any, adam: torch.optim.AdamW, stage: int) -> Iterator[torch.Tensor]:
    """Adam's own count of steps, one scalar a partition."""
    for partition in iterate_partitions(ds_optimizer, stage):
        yield adam.state[partition]["step"]


def read_parameter_state(
    parameter: nn.Parameter, adam: torch.optim.AdamW, stage: int, keys: Iterable[str] = STATE_KEYS
) -> dict[str, torch.Tensor]:
    """fp32 master, first and second moment of one parameter on the CPU; collective over DP at stages 1 to 3."""
    return {key: _read(parameter, adam, stage, key).detach().float().cpu().clone() for key in keys}


def _read(parameter: nn.Parameter, adam: torch.optim.AdamW, stage: int, key: str) -> torch.Tensor:
    if stage == 0:
        return parameter if key == "value" else adam.state[parameter][key]
    return (
        _fragments().safe_get_full_fp32_param(parameter)
        if key == "value"
        else _fragments().safe_get_full_optimizer_state(parameter, key)
    )


@torch.no_grad()
def write_parameter_state(
    parameter: nn.Parameter, state: Mapping[str, torch.Tensor], adam: torch.optim.AdamW, stage: int
) -> None:
    """The inverse of `read_parameter_state`; the model's own copy of the parameter follows the master."""
    assert tuple(state) == STATE_KEYS, f"{tuple(state)} are not {STATE_KEYS}"
    state = {key: tensor.to(parameter.device) for key, tensor in state.items()}
    if stage == 3:
        _write_stage3(parameter, state)
        return
    parameter.copy_(state["value"])
    if stage == 0:
        for key in MOMENTS:
            adam.state[parameter][key].copy_(state[key])
        return
    _fragments().safe_set_full_fp32_param(parameter, state["value"])
    for key in MOMENTS:
        _fragments().safe_set_full_optimizer_state(parameter, state[key], key)


def _write_stage3(parameter: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Each replica keeps one slice of the flattened parameter, the last one padded with zeros."""
    partition_size, dp_rank = parameter.ds_tensor.numel(), parameter.ds_process_group.rank()
    num_partitions = parameter.ds_process_group.size()

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        padded = tensor.new_zeros(partition_size * num_partitions)
        padded[: tensor.numel()] = tensor.flatten()
        return padded[dp_rank * partition_size : (dp_rank + 1) * partition_size]

    parameter.ds_tensor.copy_(cut(state["value"]))
    if parameter.numel() == parameter.ds_numel:  # at the moment gathered
        parameter.copy_(state["value"])
    _fragments().safe_set_local_fp32_param(parameter, cut(state["value"]))
    for key in MOMENTS:
        _fragments().safe_set_local_optimizer_state(parameter, cut(state[key]), key)
