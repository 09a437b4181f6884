"""Factors as HF PEFT stores them where several targets are one linear of the model: stacked on it; pure.

PEFT puts one adapter on that linear, so the A of e.g. q, k and v are stacked to [summed ranks, in], and each B has rows
and columns of its own in [all their features, summed ranks]. The zeros beside them cost file space (twice B at q,v) but
change nothing. Where the targets share one A, as in an adapter that PEFT itself trained, that A is stored once.

Shapes: A [R, H], B [O, R].
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.modules import find_stored_rows, list_linear_names
from lora_dist.files.peft_base import KEY_PREFIX
from lora_dist.lora.spec import AdapterSpec


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One linear of transformers' model and the adapters on it."""

    name: str
    """Full: `transformer.h.3.attn.c_attn`."""
    specs: tuple[AdapterSpec, ...]
    rows: Mapping[str, torch.Tensor]
    """Of each target in the linear, adapted or not."""

    @property
    def shares_a(self) -> bool:
        return self.specs[0].shares_a

    @property
    def lora_rank(self) -> int:
        return self.specs[0].lora_rank if self.shares_a else sum(spec.lora_rank for spec in self.specs)

    @property
    def alpha(self) -> float:
        """Gives the first adapter's scaling at the module's rank."""
        ratio = self.lora_rank / self.specs[0].lora_rank
        alpha = self.specs[0].alpha * (math.sqrt(ratio) if self.specs[0].rank_stabilized else ratio)
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def out_features(self) -> int:
        return sum(map(len, self.rows.values()))

    def key(self, factor: str) -> str:
        return f"{KEY_PREFIX}{self.name}.{factor}.weight"

    @property
    def magnitude_key(self) -> str:
        return f"{KEY_PREFIX}{self.name}.lora_magnitude_vector"

    @property
    def magnitude_rows(self) -> dict[str, torch.Tensor]:
        """Rows by canonical name of their lengths, of all the linear's targets, adapted or not; DoRA's."""
        first = self.specs[0]
        names = {f"layers.{first.layer}.{target}.magnitude": rows for target, rows in self.rows.items()}
        return names if first.use_dora else {}

    def compute_folded_ratios(self) -> dict[str, float]:
        """What each adapter's B is multiplied by, since PEFT has one scaling a module; those that differ from 1."""
        first = self.specs[0].scaling
        return {spec.name: spec.scaling / first for spec in self.specs if spec.scaling != first}


def group_specs(specs: Sequence[AdapterSpec], model: ModelConfig) -> list[PeftModule]:
    """Adapters by the linear that holds them."""
    groups: dict[str, list[AdapterSpec]] = defaultdict(list)
    names = list_linear_names(model)
    for spec in specs:
        groups[names[spec.target].format(layer=spec.layer)].append(spec)
    return [
        PeftModule(name, tuple(group), find_stored_rows(group[0].target, model, group[0].layer))
        for name, group in groups.items()
    ]


def compute_fused_shapes(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the factors and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in group_specs(specs, model):
        shapes[module.key("lora_A")] = (module.lora_rank, module.specs[0].in_features)
        shapes[module.key("lora_B")] = (module.out_features, module.lora_rank)
        if module.magnitude_rows:
            shapes[module.magnitude_key] = (module.out_features,)
    return shapes


def to_peft_fused(
    values: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """Whole values by canonical name -> factors by key."""
    tensors = {}
    for module in group_specs(specs, model):
        a_parts = [values[f"{spec.name}.lora_A"] for spec in module.specs]
        tensors[module.key("lora_A")] = a_parts[0] if module.shares_a else torch.cat(a_parts)
        b_OR, ratios = torch.zeros(module.out_features, module.lora_rank), module.compute_folded_ratios()
        for spec, columns in assign_columns(module):
            b_OR[module.rows[spec.target], columns] = values[f"{spec.name}.lora_B"] * ratios.get(spec.name, 1.0)
        tensors[module.key("lora_B")] = b_OR
        if rows_by_name := module.magnitude_rows:
            tensors[module.magnitude_key] = lengths_O = torch.empty(module.out_features)
            for name, rows in rows_by_name.items():
                lengths_O[rows] = values[name]
    return tensors


def from_peft_fused(
    tensors: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_fused` where no scaling was folded into B; exact."""
    values = {}
    for module in group_specs(specs, model):
        assert not module.compute_folded_ratios()
        stacked = tensors[module.key("lora_A")]
        ranks = [spec.lora_rank for spec in module.specs]
        a_parts = [stacked] * len(ranks) if module.shares_a else stacked.split(ranks)
        values.update({f"{spec.name}.lora_A": a for spec, a in zip(module.specs, a_parts, strict=True)})
        for spec, columns in assign_columns(module):
            values[f"{spec.name}.lora_B"] = tensors[module.key("lora_B")][module.rows[spec.target], columns]
        for name, rows in module.magnitude_rows.items():
            values[name] = tensors[module.magnitude_key][rows]
    return values


def assign_columns(module: PeftModule) -> list[tuple[AdapterSpec, slice]]:
    """Each adapter's columns of the stacked B."""
    columns, first = [], 0
    for spec in module.specs:
        columns.append((spec, slice(first, first + spec.lora_rank)))
        first += 0 if module.shares_a else spec.lora_rank
    return columns


def describe_fused_modules(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, float]]:
    """Full name of each adapted linear -> its rank and alpha."""
    return {module.name: (module.lora_rank, module.alpha) for module in group_specs(specs, model)}
