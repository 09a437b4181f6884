"""Adapters on a live sharded model that does not train: loaded, merged, taken out and exchanged in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_dist.lora.experts import ExpertAdapter
from lora_dist.lora.layer import LoraShard
from lora_dist.lora.merge import WeightMerge
from lora_dist.lora.mixed import MixedLoraShard
from lora_dist.lora.spec import AdapterSpec
from lora_dist.mcore.adapters import build_shards, describe_factors
from lora_dist.mcore.base_parameters import describe_base_parameters
from lora_dist.mcore.experts import WeightPlace, split_by_expert
from lora_dist.mcore.layers import LoraLinear
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter, find_source
from lora_dist.quant.weight import find_quantized
from lora_dist.whole import cut_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """One task's factors on this process, in no linear yet."""

    name: str
    shards: dict[str, LoraShard]
    """By the local name of the linear: `decoder.layers.0.mlp.linear_fc1`."""
    replaced: dict[str, torch.Tensor]
    """Of the base's own parameters those that trained, biases and whole modules: this shard's, by local parameter name,
    in the model's dtype."""
    shared: str | None = None
    """What in it all rows of a batch would share, the same on every process; None where each row can have its own."""


@torch.no_grad()
def load_shards(
    gpt: ShardedGpt, name: str, specs: Sequence[AdapterSpec], values: Mapping[str, torch.Tensor]
) -> LoadedAdapter:
    """This process's part of the whole `values` (by canonical name); nothing is communicated."""
    shards = build_shards(gpt, specs, seed=0)
    for shard in shards.values():
        for one in describe_factors(shard):
            one.parameter.copy_(cut_shard(values[one.name], one, gpt.topology))
        shard.requires_grad_(False)
    replaced = {}
    local_names = {id(parameter): local for local, parameter in gpt.named_parameters()}
    for one in describe_base_parameters(gpt):
        if (source := find_source(one)) in values:
            replaced[local_names[id(one.parameter)]] = cut_shard(values[source], one, gpt.topology).to(one.parameter)
    return LoadedAdapter(name=name, shards=shards, replaced=replaced, shared=_find_shared(specs, values))


def _find_shared(specs: Sequence[AdapterSpec], values: Mapping[str, torch.Tensor]) -> str | None:
    of_base = [name for name in values if not name.startswith("layers.")]
    if of_base:
        return "trained biases" if all(name.endswith(".bias") for name in of_base) else "trained modules"
    if any(spec.num_experts is not None for spec in specs):
        return "adapters on experts"
    return "DoRA's row lengths" if specs[0].use_dora else None


def attach_adapters(gpt: ShardedGpt, adapters: Sequence[LoadedAdapter]) -> None:
    """Put several adapters beside the weights; `Batch.adapter_of_row` then says which one each row uses, or none.

    What was attached before is replaced; an empty sequence leaves the base alone. ValueError for trained biases or
    modules and for DoRA, which are the whole batch's.
    """
    for adapter in adapters:
        if adapter.shared is not None:
            raise ValueError(
                f"{adapter.name} has {adapter.shared}, which the rows of a batch share; give it alone, as adapter=DIR,"
                " or lora-dist merge it"
            )
    adapted = {name for adapter in adapters for name in adapter.shards}
    for name, linear in gpt.named_modules():
        if isinstance(linear, LoraLinear):
            shards = [adapter.shards.get(name) for adapter in adapters]
            linear.lora = MixedLoraShard(shards, gpt.clock) if name in adapted else None


@torch.no_grad()
def attach_alone(gpt: ShardedGpt, adapter: LoadedAdapter) -> None:
    """Put one adapter, whatever it has, where it was trained: factors beside the weights, the rest in the base's place.

    Nothing takes it out again.
    """
    for name, shard in adapter.shards.items():
        gpt.get_submodule(name).lora = shard
    for name, value in adapter.replaced.items():
        gpt.get_parameter(name).copy_(value)


def describe_attached(adapter: LoadedAdapter) -> list[TrainableParameter]:
    """The adapter's factors, to be trained beside others; names start with the adapter's own."""
    described = [one for shard in adapter.shards.values() for one in describe_factors(shard)]
    for one in described:
        one.name = f"{adapter.name}/{one.name}"
        one.parameter.requires_grad_(True)
    return described


class LiveMerge:
    """A frozen model into which one adapter at a time is merged: no latency, no gather, the base never lost."""

    def __init__(self, gpt: ShardedGpt, *, keep_base: bool = True) -> None:
        """ValueError where the base is quantised: adding to it would round everything again."""
        if quantized := find_quantized(gpt):
            raise ValueError(
                f"model.base_format={quantized[0].base_format}: an adapter cannot be merged into a quantised base in"
                " place; leave merge=false, or `lora-dist merge`, which writes the merged model"
            )
        self._gpt, self._keep_base = gpt, keep_base
        self._merges: dict[WeightPlace, WeightMerge] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self.merged: str | None = None
        """Name of the adapter in the weights."""

    @property
    def kept_bytes(self) -> int:
        """Memory this process spends to be able to go back: the base rows of the adapted projections, and what trained
        of the base itself."""
        return sum(value.nbytes for value in self._kept.values()) + sum(
            merge.kept_bytes for merge in self._merges.values()
        )

    def merge(self, adapter: LoadedAdapter) -> None:
        """Base plus `adapter`, in place of what was merged: the first merge and a switch of tasks are the same."""
        assert self._keep_base or self.merged is None, f"{self.merged} was merged for good"
        self._apply(split_by_expert(adapter.shards), adapter.replaced)
        self.merged = adapter.name

    def unmerge(self) -> None:
        """The base again, bit for bit."""
        assert self._keep_base, "the base was not kept"
        self._apply({}, {})
        self.merged = None

    @torch.no_grad()
    def _apply(
        self, shards: Mapping[WeightPlace, LoraShard | ExpertAdapter], replaced: Mapping[str, torch.Tensor]
    ) -> None:
        for name, expert in [*self._merges, *(place for place in shards if place not in self._merges)]:
            linear = self._gpt.get_submodule(name)
            assert linear.lora is None, f"{name} would apply an adapter twice"
            weight_OH = linear.weight if expert is None else linear.weight[expert]
            merge = self._merges.setdefault((name, expert), WeightMerge(weight_OH, keep_base=self._keep_base))
            merge.merge(shards.get((name, expert)))
        for name, value in replaced.items():
            parameter = self._gpt.get_parameter(name)
            if self._keep_base:
                self._kept.setdefault(name, parameter.clone())
            parameter.copy_(value)
        for name in [name for name in self._kept if name not in replaced]:
            self._gpt.get_parameter(name).copy_(self._kept.pop(name))
