"""What happens to the gradients between backward and the optimizer: partial sums, tied copies, norm, checks."""

import zlib
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.whole import cut_shard, place_shard


def sum_tp_partial_gradients(trainable: Sequence[TrainableParameter], topology: Topology) -> None:
    """Sum the TP-partial gradients over TP, once a step, in one bucket a dtype, before norm and clipping.

    These are A of column-parallel linears and B of row-parallel ones (at GPT-3 175B, rank 4 on q and v, 19 MB in
    all), what acts on a sequence shard under sequence parallelism, and rows that several ranks have.
    """
    if topology.tp_size > 1:
        shared = [one for one in trainable if one.tp_ranges is not None]
        wholes = [_spread(one, topology.tp_rank) for one in shared]
        partial = [_gradient(one) for one in trainable if one.tp_partial_grad]
        _sum_coalesced(partial + wholes, topology.tp_group)
        for one, whole in zip(shared, wholes, strict=True):
            _gradient(one).copy_(cut_shard(whole, one, topology))


def _spread(one: TrainableParameter, tp_rank: int) -> torch.Tensor:
    """This rank's gradient in its places of the whole, zero elsewhere."""
    gradient = _gradient(one)
    whole = gradient.new_zeros(one.full_shape)
    place_shard(gradient, whole, one, tp_rank)
    return whole


def sum_tied_embedding_gradients(trainable: Sequence[TrainableParameter], topology: Topology) -> None:
    """Sum the first and last stage's gradients of the tied embedding, so that both copies take the same step."""
    if topology.embedding_group is not None:
        _sum_coalesced([_gradient(one) for one in trainable if one.tied], topology.embedding_group)


def _gradient(one: TrainableParameter) -> torch.Tensor:
    gradient = one.parameter.grad
    assert gradient is not None, f"{one.name} has no gradient to sum"
    return gradient


def _sum_coalesced(gradients: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    for _, same_dtype in groupby(sorted(gradients, key=lambda g: str(g.dtype)), key=lambda g: g.dtype):
        bucket = list(same_dtype)
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def assert_every_gradient(trainable: Sequence[TrainableParameter]) -> None:
    """RuntimeError naming the trainable parameters that backward did not reach: training them would do nothing."""
    missing = [one.name for one in trainable if one.parameter.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise RuntimeError(f"{len(missing)} of {len(trainable)} trainable parameters got no gradient: {shown}")


def compute_grad_norm(trainable: Sequence[TrainableParameter], topology: Topology) -> torch.Tensor:
    """Global 2-norm of gradients that are already whole over DP; each element of the whole model counted once.

    Shards are summed over TP; what TP replicates counts on its first rank; a tied copy does not count.
    """
    total = torch.zeros((), dtype=torch.float32, device=topology.device)
    for one in trainable:
        counts = one.owned and (one.shard_dim is not None or topology.tp_rank == 0)
        if counts:
            for part in _list_first_held(one, topology.tp_rank):
                total += part.float().pow(2).sum()
    dist.all_reduce(total, group=topology.model_parallel_group)
    return total.sqrt()


def _list_first_held(one: TrainableParameter, tp_rank: int) -> list[torch.Tensor]:
    """The parts of the gradient that no rank before this one has."""
    if one.tp_ranges is None:
        return [_gradient(one)]
    parts = _gradient(one).split([size for _, size in one.tp_ranges[tp_rank]])
    return [part for part, is_first in zip(parts, _find_first_held(one, tp_rank), strict=True) if is_first]


def _find_first_held(one: TrainableParameter, tp_rank: int) -> list[bool]:
    assert one.tp_ranges is not None
    before = {part for ranges in one.tp_ranges[:tp_rank] for part in ranges}
    return [part not in before for part in one.tp_ranges[tp_rank]]


def counts_in_norm(one: TrainableParameter, tp_rank: int) -> bool:
    """Whether this rank's shard counts whole in a norm over TP, or not at all where it is False."""
    if one.tp_ranges is None:
        return one.shard_dim is not None
    first_held = _find_first_held(one, tp_rank)
    assert len(set(first_held)) == 1, f"{one.name} counts in part"
    return first_held[0]


def all_gradients_finite(trainable: Sequence[TrainableParameter], topology: Topology) -> bool:
    """True where no process of the job holds an infinity or a NaN; agreed by all."""
    worst = torch.zeros((), dtype=torch.float32, device=topology.device)
    for one in trainable:
        worst += (~torch.isfinite(_gradient(one).sum())).float()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item() == 0.0


def check_replicas(trainable: Sequence[TrainableParameter], topology: Topology) -> None:
    """RuntimeError where a parameter that TP replicates is not bit-identical on its replicas.

    Compares 32-bit checksums, a few bytes a parameter.
    """
    replicated = [one for one in trainable if one.shard_dim is None]
    if topology.tp_size == 1 or not replicated:
        return
    sums = torch.tensor([_checksum(one.parameter) for one in replicated], dtype=torch.int64, device=topology.device)
    smallest, largest = sums.clone(), sums.clone()
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=topology.tp_group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=topology.tp_group)
    drifted = [one.name for one, low, high in zip(replicated, smallest, largest, strict=True) if low != high]
    if drifted:
        raise RuntimeError(f"replicas differ over tensor parallelism: {', '.join(drifted[:5])} ({len(drifted)} in all)")


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
