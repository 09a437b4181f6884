"""PiSSA on shards: each whole matrix is decomposed on one process, and its principal part leaves the frozen base.

The matrices are dealt out over TP and DP, a process holding one at a time; every process then gets the same factors,
and so has the same start at any topology.

Shapes: O output features, H input features, R lora_rank; of the whole matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lora_dist.lora.layer import LoraShard
from lora_dist.lora.pissa import INITIAL_A, INITIAL_B, compute_principal_factors
from lora_dist.lora.spec import AdapterSpec
from lora_dist.mcore.adapters import describe_factors
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.whole import cut_shard, join_shards

_Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Site:
    """One adapter and the rows of a weight shard that it adds to."""

    spec: AdapterSpec
    shard: LoraShard
    weight: nn.Parameter
    rows: torch.Tensor | None
    described_a: TrainableParameter
    described_b: TrainableParameter

    @property
    def local_OH(self) -> torch.Tensor:
        weight = self.weight.detach()
        return (weight if self.rows is None else weight.index_select(0, self.rows)).contiguous()


@torch.no_grad()
def split_base(gpt: ShardedGpt) -> list[TrainableParameter]:
    """Start this stage's adapters as PiSSA does. Returns what they begin with, kept on the host: it does not train,
    but is taken out of them again when they are written. Collective over TP and DP.
    """
    linears = [module for module in gpt.modules() if isinstance(getattr(module, "lora", None), LoraShard)]
    sites = [site for linear in linears for site in _list_sites(linear.weight, linear.lora)]
    topology = gpt.topology
    at_once = topology.tp_size * topology.zero_size
    for first in range(0, len(sites), at_once):
        round_sites = sites[first : first + at_once]
        for site, factors in zip(round_sites, _decompose(round_sites, topology), strict=True):
            _start(site, *factors, topology)
    return [one for linear in linears for one in _keep_initial(linear.lora)]


def _list_sites(weight: nn.Parameter, shard: LoraShard) -> list[_Site]:
    described = {one.name: one for one in describe_factors(shard)}
    return [
        _Site(spec, shard, weight, rows, described[f"{spec.name}.lora_A"], described[f"{spec.name}.lora_B"])
        for spec, rows in shard.list_rows()
    ]


def _decompose(sites: Sequence[_Site], topology: Topology) -> list[_Factors]:
    """Whole factors of at most TP x DP matrices: replica d, TP rank t decomposes number d * tp_size + t."""
    tp_size = topology.tp_size
    of_replica = range(topology.zero_rank * tp_size, min(len(sites), (topology.zero_rank + 1) * tp_size))
    factors = [_allocate(site) for site in sites]
    mine = None
    for number in of_replica:
        whole_OH = _gather(sites[number], number % tp_size, topology)
        mine = mine if whole_OH is None else (number, whole_OH)
    if mine is not None:
        number, whole_OH = mine
        spec = sites[number].spec
        for factor, value in zip(
            factors[number], compute_principal_factors(whole_OH, spec.lora_rank, spec.scaling), strict=True
        ):
            factor.copy_(value)
    for number in of_replica:
        for factor in factors[number]:
            dist.broadcast(factor, group=topology.tp_group, group_src=number % tp_size)
    for number, pair in enumerate(factors):
        for factor in pair:
            dist.broadcast(factor, group=topology.zero_group, group_src=number // tp_size)
    return factors


def _allocate(site: _Site) -> _Factors:
    spec, weight = site.spec, site.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a_RH = torch.empty(spec.lora_rank, spec.in_features, dtype=dtype, device=weight.device)
    return a_RH, torch.empty(spec.out_features, spec.lora_rank, dtype=dtype, device=weight.device)


def _gather(site: _Site, tp_rank: int, topology: Topology) -> torch.Tensor | None:
    """The whole matrix on `tp_rank` of this replica."""
    local_OH = site.local_OH
    if topology.tp_size == 1:
        return local_OH
    if site.shard.place.is_whole:
        return local_OH if topology.tp_rank == tp_rank else None
    parts = None
    if topology.tp_rank == tp_rank:
        parts = [torch.empty_like(local_OH) for _ in range(topology.tp_size)]
    dist.gather(local_OH, parts, group=topology.tp_group, group_dst=tp_rank)
    if parts is None:
        return None
    return join_shards(parts, site.described_b) if site.shard.place.column_parallel else torch.cat(parts, 1)


def _start(site: _Site, whole_a_RH: torch.Tensor, whole_b_OR: torch.Tensor, topology: Topology) -> None:
    """This shard's factors, and the base without what they add to it, formed in fp32 and rounded once."""
    a, b = site.shard.factors(site.spec)
    a.copy_(cut_shard(whole_a_RH, site.described_a, topology))
    b.copy_(cut_shard(whole_b_OR, site.described_b, topology))
    base_OH = site.local_OH
    dtype = torch.promote_types(base_OH.dtype, a.dtype)
    rest_OH = torch.addmm(base_OH.to(dtype), b.to(dtype), a.to(dtype), alpha=-site.spec.scaling).to(base_OH.dtype)
    if site.rows is None:
        site.weight.copy_(rest_OH)
    else:
        site.weight.index_copy_(0, site.rows, rest_OH)


def _keep_initial(shard: LoraShard) -> list[TrainableParameter]:
    names = {"lora_A": INITIAL_A, "lora_B": INITIAL_B}
    return [
        TrainableParameter(
            name=f"{one.name.removesuffix(one.kind)}{names[one.kind]}",
            parameter=nn.Parameter(one.parameter.detach().cpu().clone(), requires_grad=False),
            full_shape=one.full_shape,
            shard_dim=one.shard_dim,
            tp_ranges=one.tp_ranges,
            tp_partial_grad=False,
            kind="constant",
        )
        for one in describe_factors(shard)
    ]
