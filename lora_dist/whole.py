"""Whole tensors out of TP shards and pipeline stages, one at a time, and shards out of whole tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology

ReadState = Callable[[TrainableParameter], Mapping[str, torch.Tensor]]
"""This TP shard's tensors of one parameter, each in the shard's shape; may be collective over DP."""


@dataclass(frozen=True, slots=True)
class WholeName:
    """One parameter of the whole model, known to every process."""

    name: str
    full_shape: tuple[int, ...]
    pp_rank: int
    """Stage that holds it."""
    kept_dtype: torch.dtype | None = None
    """As the parameter's."""


def read_value(one: TrainableParameter) -> dict[str, torch.Tensor]:
    """The parameter itself, where nothing partitions it over DP; dequantised where it is quantised."""
    if one.quantized is not None:
        return {"value": one.quantized.dequantize(one.parameter.dtype)}
    return {"value": one.parameter.detach()}


def with_constants(read: ReadState) -> ReadState:
    """`read` for what does not train too, which has no state but its value."""
    return lambda one: read_value(one) if one.kind == "constant" else read(one)


def read_by_expert(read: ReadState) -> ReadState:
    """`read` for experts' single weights too: what holds a layer's is read once, when its first expert's turn comes."""
    last: dict[str, Mapping[str, torch.Tensor]] = {}

    def read_one(one: TrainableParameter) -> Mapping[str, torch.Tensor]:
        if one.stack is None:
            return read(one)
        stacked, expert = one.stack
        if stacked.name not in last:
            last.clear()
            last[stacked.name] = read(stacked)
        return {key: value[expert] for key, value in last[stacked.name].items()}

    return read_one


def list_whole(trainable: Sequence[TrainableParameter], topology: Topology) -> list[WholeName]:
    """Every owned parameter of the whole model, stage by stage, the same on every process. Collective over PP."""
    mine = [WholeName(one.name, one.full_shape, topology.pp_rank, one.kept_dtype) for one in trainable if one.owned]
    stages: list[list[WholeName]] = [mine] * topology.pp_size
    if topology.pp_size > 1:
        dist.all_gather_object(stages, mine, group=topology.pp_group)
    return [name for stage in stages for name in stage]


def iterate_stage(
    trainable: Sequence[TrainableParameter], topology: Topology, read: ReadState, dtype: torch.dtype
) -> Iterator[tuple[TrainableParameter, dict[str, torch.Tensor]]]:
    """This stage's owned parameters, whole over TP, on the CPU of its first TP rank of replica 0; {} elsewhere.

    Every process of the stage iterates to the end.
    """
    for one in trainable:
        if one.owned:
            state = read(one)
            gathered = {}
            if topology.zero_rank == 0:
                kept = one.kept_dtype or dtype
                gathered = {key: _gather_over_tp(local.to(kept), one, topology) for key, local in state.items()}
            yield one, {key: whole.cpu() for key, whole in gathered.items() if whole is not None}


def iterate_model(
    entries: Sequence[WholeName],
    trainable: Sequence[TrainableParameter],
    topology: Topology,
    read: ReadState,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Name and whole "value" of each of `list_whole`'s entries, on the CPU of global rank 0; None elsewhere.

    Every process iterates to the end; no more than one tensor is in flight.
    """
    stage = iterate_stage(trainable, topology, read, dtype)
    for entry in entries:
        whole = None
        if entry.pp_rank == topology.pp_rank:
            one, state = next(stage)
            assert one.name == entry.name
            whole = state.get("value")
        yield entry.name, _bring_to_first_stage(whole, entry, topology, entry.kept_dtype or dtype)
    assert next(stage, None) is None


def write_together(write: Callable[[], None] | None, stream: Iterator[object]) -> None:
    """Run `write`, which consumes `stream`, where this process is a writer; take part in the rest of `stream` anyway.

    OSError on every process where one of them could not write: nobody waits for a peer that has given up.
    """
    error: OSError | None = None
    if write is not None:
        try:
            write()
        except OSError as failure:
            error = failure
    for _ in stream:
        pass
    raise_together(error)


def raise_together(error: OSError | None) -> None:
    """OSError on every process of the job where any of them has one. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else str(error))
    failed = {global_rank: message for global_rank, message in enumerate(errors) if message is not None}
    if failed:
        raise OSError("; ".join(f"global rank {global_rank}: {message}" for global_rank, message in failed.items()))


def _gather_over_tp(local: torch.Tensor, one: TrainableParameter, topology: Topology) -> torch.Tensor | None:
    """The whole tensor on tp_rank 0, without the rows that pad a vocabulary; None on the others."""
    if one.shard_dim is None or topology.tp_size == 1:
        return _cut_padding(local, one) if topology.tp_rank == 0 else None
    local = local.to(topology.device).contiguous()
    parts = [torch.empty_like(local) for _ in range(topology.tp_size)] if topology.tp_rank == 0 else None
    dist.gather(local, parts, group=topology.tp_group, group_dst=0)
    return _cut_padding(join_shards(parts, one), one) if parts is not None else None


def join_shards(parts: Sequence[torch.Tensor], one: TrainableParameter) -> torch.Tensor:
    """The TP ranks' shards as one tensor, padding included."""
    assert one.shard_dim is not None
    if one.tp_ranges is not None:
        whole = parts[0].new_empty(one.full_shape[0], *parts[0].shape[1:])
        for tp_rank, part in enumerate(parts):
            place_shard(part, whole, one, tp_rank)
        return whole
    if one.num_blocks == 1:
        return torch.cat(list(parts), one.shard_dim)
    blocks = zip(*(part.chunk(one.num_blocks, one.shard_dim) for part in parts), strict=True)
    return torch.cat([torch.cat(block, one.shard_dim) for block in blocks], one.shard_dim)


def place_shard(part: torch.Tensor, whole: torch.Tensor, one: TrainableParameter, tp_rank: int) -> None:
    """Write the shard of `tp_rank` over its rows of `whole`, where ranks share rows."""
    assert one.tp_ranges is not None
    ranges = one.tp_ranges[tp_rank]
    for own, (start, size) in zip(part.split([size for _, size in ranges]), ranges, strict=True):
        whole[start : start + size] = own


def _cut_padding(whole: torch.Tensor, one: TrainableParameter) -> torch.Tensor:
    return whole.narrow(0, 0, one.full_shape[0])


def _bring_to_first_stage(
    whole: torch.Tensor | None, entry: WholeName, topology: Topology, dtype: torch.dtype
) -> torch.Tensor | None:
    """Send from the holding stage's first process to global rank 0, which is in the same pipeline group."""
    on_path = topology.zero_rank == 0 and topology.tp_rank == 0 and entry.pp_rank != 0
    if on_path and topology.pp_rank == entry.pp_rank:
        assert whole is not None
        dist.send(whole.to(topology.device).contiguous(), group=topology.pp_group, group_dst=0)
        return None
    if on_path and topology.is_first_stage:
        received = torch.empty(entry.full_shape, dtype=dtype, device=topology.device)
        dist.recv(received, group=topology.pp_group, group_src=entry.pp_rank)
        return received.cpu()
    return whole if topology.global_rank == 0 else None


def read_shard(read: Callable[[int, int], torch.Tensor], one: TrainableParameter, topology: Topology) -> torch.Tensor:
    """This TP rank's shard out of `read(start, size)` along `shard_dim` of the whole tensor, padded where it ends."""
    parts = [read(start, size) for start, size in _compute_shard_ranges(one, topology)]
    assert one.shard_dim is not None
    return pad_shard(parts[0] if len(parts) == 1 else torch.cat(parts, one.shard_dim), one)


def _compute_shard_ranges(one: TrainableParameter, topology: Topology) -> list[tuple[int, int]]:
    """Start and length of each block's part of this TP rank, without vocabulary padding."""
    assert one.shard_dim is not None
    if one.tp_ranges is not None:
        return list(one.tp_ranges[topology.tp_rank])
    full_size, size = one.full_shape[one.shard_dim], one.local_shape[one.shard_dim] // one.num_blocks
    block_size = full_size // one.num_blocks
    start = min(block_size, topology.tp_rank * size)
    return [(block * block_size + start, min(size, block_size - start)) for block in range(one.num_blocks)]


def pad_shard(part: torch.Tensor, one: TrainableParameter) -> torch.Tensor:
    """`part` in the shape of the local parameter; the rows that pad a vocabulary are zero."""
    if tuple(part.shape) == one.local_shape:
        return part
    padded = part.new_zeros(one.local_shape)
    padded[: part.shape[0]] = part
    return padded


def cut_shard(whole: torch.Tensor, one: TrainableParameter, topology: Topology) -> torch.Tensor:
    """This TP rank's part of a whole tensor."""
    dim = one.shard_dim
    if dim is None:
        return whole
    return read_shard(lambda start, size: whole.narrow(dim, start, size), one, topology)
