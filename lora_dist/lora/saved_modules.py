"""Whole modules of the base that train beside the adapters, by GPT-2's names for them; pure."""

import re
from collections.abc import Sequence

_MODULES = {
    "wte": re.compile(r"embedding\.word_embeddings\..*"),
    "wpe": re.compile(r"embedding\.position_embeddings\..*"),
    "ln_1": re.compile(r"decoder\.layers\.\d+\.input_layernorm\..*"),
    "ln_2": re.compile(r"decoder\.layers\.\d+\.pre_mlp_layernorm\..*"),
    "ln_f": re.compile(r"decoder\.final_layernorm\..*"),
}


def is_saved(canonical_name: str, modules: Sequence[str]) -> bool:
    """Whether a base parameter belongs to one of `modules` (names of lora.modules_to_save)."""
    return any(_MODULES[module].fullmatch(canonical_name) for module in modules)
