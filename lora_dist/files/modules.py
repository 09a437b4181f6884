"""The names that other tools give to the linears of a layer, read into canonical targets and kept for the way back."""

import re
from dataclasses import dataclass

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_deepseek_v3 import DEEPSEEK_V3_NAMES
from lora_dist.files.hf_deepseek_v32 import SPARSE_FAMILIES
from lora_dist.files.hf_experts import MIXTRAL_NAMES, QWEN3_MOE_NAMES
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_gemma3 import GEMMA3_NAMES
from lora_dist.files.hf_glm4_moe import GLM4_MOE_NAMES
from lora_dist.files.hf_gpt_oss import GPT_OSS_NAMES
from lora_dist.files.hf_llama import LLAMA_FAMILIES, LLAMA_NAMES
from lora_dist.files.hf_minimax_m2 import MINIMAX_M2_NAMES
from lora_dist.files.hf_neox import NEOX_NAMES
from lora_dist.files.hf_olmo import OLMO2_NAMES
from lora_dist.files.hf_opt import OPT_NAMES
from lora_dist.files.hf_phi3 import PHI3_NAMES
from lora_dist.files.hf_qwen3_5 import QWEN3_5_MOE_NAMES, QWEN3_5_NAMES
from lora_dist.files.hf_qwen3_next import QWEN3_NEXT_NAMES
from lora_dist.files.hf_wrappers import name_in_memory
from lora_dist.lora.layer import compute_fused_rows
from lora_dist.lora.targets import compute_linear_shapes, find_linear, find_targets

GPT2_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "transformer.h.{layer}.attn.c_attn"),
    "o_proj": "transformer.h.{layer}.attn.c_proj",
    "up_proj": "transformer.h.{layer}.mlp.c_fc",
    "down_proj": "transformer.h.{layer}.mlp.c_proj",
}
FAMILY_NAMES: dict[str, dict[str, str]] = {
    "gpt2": GPT2_NAMES,
    **dict.fromkeys((*LLAMA_FAMILIES, "granite", "seed_oss", "ministral3", "smollm3"), LLAMA_NAMES.list_target_names()),
    "mixtral": MIXTRAL_NAMES.list_target_names(),
    "qwen3_moe": QWEN3_MOE_NAMES.list_target_names(),
    "qwen3_next": QWEN3_NEXT_NAMES.list_target_names(),
    "qwen3_5_text": QWEN3_5_NAMES.list_target_names(),
    "qwen3_5_moe_text": QWEN3_5_MOE_NAMES.list_target_names(),
    "glm4_moe": GLM4_MOE_NAMES.list_target_names(),
    **dict.fromkeys(("olmo2", "olmo3"), OLMO2_NAMES.list_target_names()),
    "minimax_m2": MINIMAX_M2_NAMES.list_target_names(),
    **dict.fromkeys(("deepseek_v3", *SPARSE_FAMILIES), DEEPSEEK_V3_NAMES.list_target_names()),
    "gpt_oss": GPT_OSS_NAMES.list_target_names(),
    "gemma3_text": GEMMA3_NAMES.list_target_names(),
    "phi3": PHI3_NAMES.list_target_names(),
    "opt": OPT_NAMES.list_target_names(),
    "gpt_neox": NEOX_NAMES.list_target_names(),
}
"""Target -> template of its linear in transformers, by family."""
_LAYER = re.compile(r"(?:.*\.)?(?:h|layers?|blocks?)\.(\d+)\.(.+)")


def list_linear_names(model: ModelConfig) -> dict[str, str]:
    """Target -> template of its linear in transformers, of this model."""
    return {target: name_in_memory(name, model.wrapper) for target, name in FAMILY_NAMES[model.family].items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleName:
    """One linear of another tool's model."""

    layer: int
    targets: tuple[str, ...]
    """Several where it is a fused projection."""
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
    """One linear for several targets: GPT-2's, GPT-NeoX's, Phi-3's, Qwen3.5's."""
    return name.rpartition(".")[2] in ("c_attn", "query_key_value", "qkv_proj", "gate_up_proj", "in_proj_qkv")


def find_stored_rows(target: str, model: ModelConfig, layer: int) -> dict[str, torch.Tensor]:
    """Rows of each target in the linear of transformers that has a layer's `target`, alone or fused with others.

    One target after the other in GPT-2 and Phi-3; in GPT-NeoX q, k and v head by head, as in Megatron.
    """
    beside = next((fused for fused in model.architecture.fused_targets if target in fused), None)
    if beside is None:
        return {target: torch.arange(compute_linear_shapes(model, layer)[target][1])}
    all_rows = compute_fused_rows(target, model, layer)
    assert all_rows is not None
    rows = {one: all_rows[one] for one in beside}
    name = f"decoder.layers.{layer}.{find_linear(target, model)}.weight"
    for part in HF_FAMILIES[model.family].find_parts(name, model):
        if part.target in rows:
            rows[part.target] = torch.arange(part.first, part.first + len(rows[part.target]))
    return rows
