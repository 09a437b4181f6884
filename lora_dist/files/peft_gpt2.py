"""Factors as HF PEFT stores them on GPT-2: names, and q, k, v stacked on the one fused c_attn; pure.

PEFT puts one adapter on c_attn, so the A of q, k and v are stacked to [summed ranks, in] and their B become the
blocks of [3 hidden, summed ranks]. A block matrix's zeros cost file space (twice B at q,v) but change nothing.
Where q, k and v share one A, as an adapter that PEFT itself trained does, that A is stored once.

Shapes: A [R, H], B [O, R].
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_dist.files.hf_gpt2 import PREFIX, QKV_TARGETS
from lora_dist.lora.spec import AdapterSpec

_KEY_PREFIX = f"base_model.model.{PREFIX}"
_MODULE_OF_TARGET = {
    **dict.fromkeys(QKV_TARGETS, "attn.c_attn"),
    "o_proj": "attn.c_proj",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One linear of GPT-2 and the adapters on it."""

    name: str
    """`h.3.attn.c_attn`"""
    specs: tuple[AdapterSpec, ...]

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
        return self.specs[0].out_features * (3 if self.is_qkv else 1)

    @property
    def is_qkv(self) -> bool:
        return self.name.endswith("c_attn")

    def key(self, factor: str) -> str:
        return f"{_KEY_PREFIX}{self.name}.{factor}.weight"

    @property
    def magnitude_key(self) -> str:
        return f"{_KEY_PREFIX}{self.name}.lora_magnitude_vector"

    @property
    def magnitude_names(self) -> list[str]:
        """Canonical names of the lengths of all its rows, q's, k's and v's whether they are adapted or not; DoRA's."""
        first = self.specs[0]
        targets = QKV_TARGETS if self.is_qkv else (first.target,)
        return [f"layers.{first.layer}.{target}.magnitude" for target in targets] if first.use_dora else []

    def compute_folded_ratios(self) -> dict[str, float]:
        """What each adapter's B is multiplied by, since PEFT has one scaling a module; those that differ from 1."""
        first = self.specs[0].scaling
        return {spec.name: spec.scaling / first for spec in self.specs if spec.scaling != first}


def group_specs(specs: Sequence[AdapterSpec]) -> list[PeftModule]:
    """Adapters by the linear of GPT-2 that holds them."""
    groups: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[f"h.{spec.layer}.{_MODULE_OF_TARGET[spec.target]}"].append(spec)
    return [PeftModule(name, tuple(group)) for name, group in groups.items()]


def compute_fused_shapes(specs: Sequence[AdapterSpec]) -> dict[str, tuple[int, ...]]:
    """Every key of the factors and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in group_specs(specs):
        shapes[module.key("lora_A")] = (module.lora_rank, module.specs[0].in_features)
        shapes[module.key("lora_B")] = (module.out_features, module.lora_rank)
        if module.magnitude_names:
            shapes[module.magnitude_key] = (module.out_features,)
    return shapes


def to_peft_fused(values: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec]) -> dict[str, torch.Tensor]:
    """Whole values by canonical name -> factors by key."""
    tensors = {}
    for module in group_specs(specs):
        a_parts = [values[f"{spec.name}.lora_A"] for spec in module.specs]
        tensors[module.key("lora_A")] = a_parts[0] if module.shares_a else torch.cat(a_parts)
        b_OR, ratios = torch.zeros(module.out_features, module.lora_rank), module.compute_folded_ratios()
        for spec, block in _iterate_blocks(module, b_OR):
            block.copy_(values[f"{spec.name}.lora_B"] * ratios.get(spec.name, 1.0))
        tensors[module.key("lora_B")] = b_OR
        if names := module.magnitude_names:
            tensors[module.magnitude_key] = torch.cat([values[name] for name in names])
    return tensors


def from_peft_fused(tensors: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec]) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_fused` where no scaling was folded into B; exact."""
    values = {}
    for module in group_specs(specs):
        assert not module.compute_folded_ratios()
        stacked = tensors[module.key("lora_A")]
        ranks = [spec.lora_rank for spec in module.specs]
        a_parts = [stacked] * len(ranks) if module.shares_a else stacked.split(ranks)
        values.update({f"{spec.name}.lora_A": a for spec, a in zip(module.specs, a_parts, strict=True)})
        for spec, block in _iterate_blocks(module, tensors[module.key("lora_B")]):
            values[f"{spec.name}.lora_B"] = block
        if names := module.magnitude_names:
            values.update(zip(names, tensors[module.magnitude_key].chunk(len(names)), strict=True))
    return values


def _iterate_blocks(module: PeftModule, b_OR: torch.Tensor) -> list[tuple[AdapterSpec, torch.Tensor]]:
    """Each adapter's block of the stacked B, as a view."""
    blocks, column = [], 0
    for spec in module.specs:
        row = QKV_TARGETS.index(spec.target) * spec.out_features if module.is_qkv else 0
        blocks.append((spec, b_OR[row : row + spec.out_features, column : column + spec.lora_rank]))
        column += 0 if module.shares_a else spec.lora_rank
    return blocks


def describe_fused_modules(specs: Sequence[AdapterSpec]) -> dict[str, tuple[int, float]]:
    """Full name of each adapted linear -> its rank and alpha."""
    return {f"{PREFIX}{module.name}": (module.lora_rank, module.alpha) for module in group_specs(specs)}
