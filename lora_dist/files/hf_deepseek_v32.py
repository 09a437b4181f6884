"""Hugging Face's DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with an indexer beside a layer's attention; pure.

An indexer picks the positions that its layer, and those after it without one, attend to: index_topk of them (DeepSeek
Sparse Attention, arXiv:2512.02556, section 2.1; layers that share a choice, arXiv:2603.12201). In rows no longer than
that every position is picked and attention is DeepSeek-V3's.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_dist.base_shapes import compute_indexer_shapes
from lora_dist.files.hf_deepseek_v3 import (
    DEEPSEEK_V3_ABSENT,
    DEEPSEEK_V3_FAMILY,
    DEEPSEEK_V3_NAMES,
    DEEPSEEK_V3_SETTINGS,
    describe_latent_model,
    read_latent_model,
)
from lora_dist.files.hf_layout import HfFamily, get_number, get_size
from lora_dist.files.hf_shared_experts import EXTRA_LAYERS, WIDER, WITHOUT_EXTRA
from lora_dist.model_config import ModelConfig

_STORED = {
    **{"query_weight": "wq_b.weight", "key_weight": "wk.weight"},
    **{"norm_weight": "k_norm.weight", "norm_bias": "k_norm.bias", "head_weight": "weights_proj.weight"},
}
_FULL, _SHARED = "full", "shared"
_DENSE, _SPARSE = "dense", "sparse"
_LAYER_TYPES = {"indexed_attention", "deepseek_sparse_attention"}
"""The second as transformers up to 5.17 writes it."""
_SETTINGS = DEEPSEEK_V3_SETTINGS | {"rope_interleave": (True, (True,))}
_ABSENT: dict[str, dict[str, Any]] = {
    "deepseek_v32": DEEPSEEK_V3_ABSENT | {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    "glm_moe_dsa": DEEPSEEK_V3_ABSENT
    | {
        **{"num_key_value_heads": 64, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "q_lora_rank": 2048},
        **{"qk_nope_head_dim": 192, "v_head_dim": 256},
        **{"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32},
    },
}
"""What transformers takes where config.json does not say."""


def _read_fields(config: Mapping[str, Any], path: Path, *, family: str) -> dict[str, Any]:
    config = _ABSENT[family] | dict(config)
    num_layers = get_size(config, "num_hidden_layers", path)
    config["first_k_dense_replace"] = _read_num_dense(config, path, num_layers)
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and set(kinds) <= _LAYER_TYPES):
        raise ValueError(f"{path}: layer_types={kinds} is not a list of {' or '.join(sorted(_LAYER_TYPES))}")
    return {
        "family": family,
        **read_latent_model(config, path, ("default", "linear", "yarn")),
        "query_latent_size": get_size(config, "q_lora_rank", path),
        "attended_positions": get_size(config, "index_topk", path),
        "indexer_heads": get_size(config, "index_n_heads", path),
        "indexer_head_size": get_size(config, "index_head_dim", path),
        "layers_without_indexer": _read_sharing(config, path, num_layers) if family == "glm_moe_dsa" else [],
    }


def _read_num_dense(config: Mapping[str, Any], path: Path, num_layers: int) -> object:
    """first_k_dense_replace; where mlp_layer_types is there too, transformers reads that alone."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return config["first_k_dense_replace"]
    num_dense = kinds.count(_DENSE) if isinstance(kinds, list) else 0
    if kinds != [_DENSE] * num_dense + [_SPARSE] * (num_layers - num_dense):
        raise ValueError(
            f"{path}: mlp_layer_types={kinds} is not supported, only {num_layers} of them, {_DENSE} before {_SPARSE}"
        )
    return num_dense


def _read_sharing(config: Mapping[str, Any], path: Path, num_layers: int) -> list[int]:
    """Layers whose indexer is an earlier one: by a list, a pattern, or every so manieth after the first ones."""
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")  # as letters, too
    if isinstance(kinds, str):
        kinds = [{"F": _FULL, "S": _SHARED}.get(kind, kind) for kind in kinds]
    if kinds is None:
        period = max(get_number(config, "index_topk_freq", 1, path), 1)
        first = get_number(config, "index_skip_topk_offset", 2, path)
        kinds = [_SHARED if max(layer - first + 1, 0) % period else _FULL for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {_FULL, _SHARED}:
        raise ValueError(f"{path}: indexer_types={kinds} is not a list of {num_layers} times {_FULL} or {_SHARED}")
    return [layer for layer, kind in enumerate(kinds) if kind == _SHARED]


def _describe(model: ModelConfig) -> dict[str, Any]:
    described = {
        **describe_latent_model(model),
        "index_topk": model.attended_positions,
        "index_n_heads": model.indexer_heads,
        "index_head_dim": model.indexer_head_size,
    }
    if model.layers_without_indexer:
        without = set(model.layers_without_indexer)
        described["indexer_types"] = [_SHARED if layer in without else _FULL for layer in range(model.num_layers)]
    return described


def compute_stored_indexers(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every stored tensor of the indexers."""
    return {
        name_indexer_tensor(layer, name): shape
        for layer in filter(model.has_indexer, range(model.num_layers))
        for name, shape in compute_indexer_shapes(model).items()
    }


def name_indexer_tensor(layer: int, name: str) -> str:
    """In a checkpoint, of a tensor of `compute_indexer_shapes`."""
    return f"{DEEPSEEK_V3_NAMES.layers.format(layer=layer)}self_attn.indexer.{_STORED[name]}"


SPARSE_FAMILIES = {
    family: HfFamily(
        architecture=architecture,
        settings=_SETTINGS,
        read_fields=partial(_read_fields, family=family),
        describe=_describe,
        find_parts=DEEPSEEK_V3_NAMES.find_parts,
        compute_shapes=DEEPSEEK_V3_NAMES.compute_shapes,
        compute_carried=compute_stored_indexers,
        ignored=DEEPSEEK_V3_FAMILY.ignored,
        embedding=DEEPSEEK_V3_FAMILY.embedding,
        wider=re.compile(rf"{WIDER.pattern}|model\.layers\.\d+\.self_attn\.indexer\.(k_norm\..+|weights_proj\.weight)"),
        extra_layers=EXTRA_LAYERS,
        without_extra=WITHOUT_EXTRA,
    )
    for family, architecture in (
        ("deepseek_v32", "DeepseekV32ForCausalLM"),
        ("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    )
}
