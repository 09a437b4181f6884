"""The names that other tools give to the linears of a layer, read into canonical targets and kept for the way back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_dist.lora.targets import find_targets

LLAMA_NAMES = {
    **{target: f"model.layers.{{layer}}.self_attn.{target}" for target in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{target: f"model.layers.{{layer}}.mlp.{target}" for target in ("up_proj", "down_proj")},
}
"""One linear a projection, where an adapter does not say where it came from."""
GPT2_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "transformer.h.{layer}.attn.c_attn"),
    "o_proj": "transformer.h.{layer}.attn.c_proj",
    "up_proj": "transformer.h.{layer}.mlp.c_fc",
    "down_proj": "transformer.h.{layer}.mlp.c_proj",
}
_LAYER = re.compile(r"(?:.*\.)?(?:h|layers?|blocks?)\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleName:
    """One linear of another tool's model."""

    layer: int
    targets: tuple[str, ...]
    """q, k and v where it is the fused projection."""
    template: str
    """The name with `{layer}` for the layer's number."""


def parse_module_name(name: str) -> ModuleName | None:
    """`model.layers.3.self_attn.q_proj` -> layer 3, q_proj; None where that is no linear with a known name."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    parts = found[2].split(".")
    targets = find_targets(".".join(parts[-2:])) or find_targets(parts[-1])
    if not targets or (len(targets) > 1 and not is_fused(parts[-1])):
        return None
    template = f"{name[: found.start(1)]}{{layer}}{name[found.end(1) :]}"
    return ModuleName(layer=int(found[1]), targets=targets, template=template)


def is_fused(name: str) -> bool:
    """GPT-2's c_attn, whose rows are all q, then all k, then all v; other fused layouts are another matter."""
    return name.rpartition(".")[2] == "c_attn"


def fill_names(names: Mapping[str, str] | None, default: Mapping[str, str]) -> dict[str, str]:
    """`default` templates with those of the adapter's own source in front."""
    return {**default, **(names or {})}
