"""The names that other tools give to the linears of a layer, read into canonical targets and kept for the way back."""

import re
from dataclasses import dataclass

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_llama import LLAMA_FAMILIES, LLAMA_NAMES
from lora_dist.files.hf_neox import NEOX_NAMES
from lora_dist.files.hf_opt import OPT_NAMES
from lora_dist.lora.layer import compute_fused_rows
from lora_dist.lora.targets import find_targets

GPT2_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "transformer.h.{layer}.attn.c_attn"),
    "o_proj": "transformer.h.{layer}.attn.c_proj",
    "up_proj": "transformer.h.{layer}.mlp.c_fc",
    "down_proj": "transformer.h.{layer}.mlp.c_proj",
}
FAMILY_NAMES: dict[str, dict[str, str]] = {
    "gpt2": GPT2_NAMES,
    **dict.fromkeys(LLAMA_FAMILIES, LLAMA_NAMES.list_target_names()),
    "opt": OPT_NAMES.list_target_names(),
    "gpt_neox": NEOX_NAMES.list_target_names(),
}
"""Target -> template of its linear in transformers, by family."""
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
    """One linear for q, k and v: GPT-2's, or GPT-NeoX's."""
    return name.rpartition(".")[2] in ("c_attn", "query_key_value")


def find_stored_rows(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Rows of q, k and v in the linear that transformers fuses them in: one after the other in GPT-2, head by head in
    GPT-NeoX, as in Megatron.
    """
    assert model.architecture.fused_qkv, f"{model.family} has a linear for each of q, k and v"
    rows = compute_fused_rows("q_proj", model)
    assert rows is not None
    for part in HF_FAMILIES[model.family].find_parts("decoder.layers.0.self_attention.linear_qkv.bias", model):
        if part.target is not None:
            rows[part.target] = torch.arange(part.first, part.first + len(rows[part.target]))
    return rows
