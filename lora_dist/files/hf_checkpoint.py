"""A Hugging Face checkpoint directory: its configuration, what is wrong with it, and what identifies it."""

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.directories import read_json
from lora_dist.files.hash_cache import find_sha256
from lora_dist.files.hf_families import HF_FAMILIES, MODEL_TYPES
from lora_dist.files.hf_layout import TIED_HEAD, HfFamily
from lora_dist.files.hf_reader import CONFIG, HfReader, find_weight_files, list_stored_names
from lora_dist.files.hf_stacks import find_stacked_experts
from lora_dist.files.hf_wrappers import (
    BESIDE,
    TEXT,
    TIED,
    WRAPPERS,
    find_layout,
    find_wrapper,
    get_text_config,
    list_tied,
    to_stored_name,
)
from lora_dist.files.mxfp4_blocks import is_mxfp4
from lora_dist.files.quantization import QUANTIZATION, find_original_dtype, read_quantization
from lora_dist.files.safetensors_stream import DTYPE_NAMES

_ROWS_AT_ONCE = 4096
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "max_position_embeddings")

_EXPERT_SETTINGS = (
    *("normalize_expert_weights", "expert_weight_scale", "num_expert_groups", "groups_per_token"),
    *("shared_ffn_size", "num_dense_layers", "dense_ffn_size"),
)
_GATE_SETTINGS = ("swiglu_alpha", "swiglu_limit")
_LATENT_SETTINGS = ("query_latent_size", "kv_latent_size", "rope_head_size", "value_head_size", "rope_interleaved")
_INDEXER_SETTINGS = ("attended_positions", "indexer_heads", "indexer_head_size", "layers_without_indexer")
_DELTA_SETTINGS = (
    *("delta_key_heads", "delta_value_heads", "delta_key_size", "delta_value_size", "delta_kernel_size"),
    "full_attention_layers",
)
_RARE: dict[str, object] = {
    **{"unturned_layers": [], "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_divisor": 1.0},
    "query_growth": 0.0,
}
"""Settings that few models have, and what the others have."""
_COMPARED = {
    **{
        key: key
        for key in ("family", "wrapper", *_SIZES, "layernorm_epsilon", "tied_output", "rope_theta", "rope_scaling")
    },
    **{key: key for key in ("rope_divisors", "rotary_fraction", "local_rope_theta", "attention_scale")},
    **{key: key for key in ("sliding_window", *_RARE, *_LATENT_SETTINGS, *_INDEXER_SETTINGS, *_DELTA_SETTINGS)},
    **{key: key for key in ("num_experts", "stacked_experts", "experts_per_token", *_EXPERT_SETTINGS, *_GATE_SETTINGS)},
    **{"num_kv_heads": "num_query_groups", "head_size": "head_dim", "parallel_residual": "has_parallel_residual"},
    **{"activation": "mlp_activation", "qk_norm": "has_qk_norm"},
}
"""Key of the configuration -> what of the model must be as config.json has it."""


def read_model_fields(directory: str | Path) -> dict[str, Any]:
    """ModelConfig's fields as config.json gives them. ValueError for a model this project does not compute."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"model.checkpoint={directory} is not a directory; give that of a downloaded checkpoint, with config.json,"
            " safetensors and tokenizer.json"
        )
    path = directory / CONFIG
    whole = read_json(path)
    wrapper, config = find_wrapper(whole), get_text_config(whole, path)
    if wrapper is None:
        _check_setting(path, "model_type", config.get("model_type"), (*MODEL_TYPES, *WRAPPERS))
    else:
        _check_setting(path, f"{TEXT}.model_type", config["model_type"], tuple(MODEL_TYPES))
        said = list_tied(whole)
        config |= {TIED: said.pop() if len(said) == 1 else not _stores_head(directory)} if said else {}
    family = HF_FAMILIES[MODEL_TYPES[config["model_type"]]]
    if not (family.in_mxfp4 and is_mxfp4(config)):
        read_quantization(config, path)
    for key, (default, allowed) in family.settings.items():
        _check_setting(path, key, config.get(key, default), allowed)
    fields, about = family.read_fields(config, path), {"checkpoint": str(directory), "wrapper": wrapper}
    stacked = None if family.has_stacks else find_stacked_experts(directory, fields, wrapper)
    return {**fields, **about, "name": directory.resolve().name, "stacked_experts": stacked}


def _stores_head(directory: Path) -> bool:
    names = list_stored_names(directory)
    head = to_stored_name(TIED_HEAD, find_layout(names, directory))
    return any(name.startswith(head) for name in names)  # quantised, it may be several


def _check_setting(path: Path, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{path}: {key}={value!r} is not supported, only {' or '.join(map(repr, allowed))};"
            " name a checkpoint that has it"
        )


def check_hf_checkpoint(model: ModelConfig, directory: str | Path) -> None:
    """ValueError, one line, where the directory's files are not whole or not this model's. Needs no process group."""
    directory = Path(directory)
    found = ModelConfig(**read_model_fields(directory))
    for key, attribute in _COMPARED.items():
        _check_field(key, getattr(model, attribute), getattr(found, attribute), directory)
    family, reader = HF_FAMILIES[model.family], HfReader(directory)
    _check_tensors(reader, family, model)
    if model.tied_output:
        _check_tied_head(reader, family.embedding)


def _check_field(key: str, wanted: object, found: object, directory: Path) -> None:
    if wanted != found:
        raise ValueError(
            f"model.{key}={wanted} but {directory / CONFIG} has {found};"
            f" set model.{key}={found} or name another checkpoint"
        )


def _check_tensors(reader: HfReader, family: HfFamily, model: ModelConfig) -> None:
    expected = family.compute_shapes(model) | family.compute_carried(model)
    own = (name for name in reader.shapes if not name.startswith(BESIDE))
    found = {name for name in own if not family.is_ignored(name, model.num_layers)}
    for name in expected:
        if name not in found:
            raise ValueError(f"{reader.directory} has no tensor {name}; the checkpoint is incomplete")
    unknown = sorted(found - expected.keys() - {TIED_HEAD})
    if unknown:
        raise ValueError(f"{reader.directory} holds {unknown[0]} ({len(unknown)} in all), which its family has not")
    for name, shape in expected.items():
        if reader.shapes[name] != shape:
            raise ValueError(f"{reader.directory}: {name} has shape {reader.shapes[name]}, config.json says {shape}")
        if reader.dtypes[name] not in DTYPE_NAMES.values():
            raise ValueError(f"{reader.directory}: {name} is {reader.dtypes[name]}; only floating point is supported")


def _check_tied_head(reader: HfReader, embedding_name: str) -> None:
    """A stored output layer must be the embedding again: it is tied here, and another one would be dropped silently."""
    if TIED_HEAD not in reader.shapes:
        return
    num_rows = reader.shapes[embedding_name][0]
    same = reader.shapes[TIED_HEAD] == reader.shapes[embedding_name]
    for start in range(0, num_rows if same else 0, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, num_rows - start)
        head, embedding = (reader.read(name, dim=0, start=start, size=size) for name in (TIED_HEAD, embedding_name))
        same = same and torch.equal(head, embedding)
    if not same:
        raise ValueError(
            f"{reader.directory}: {TIED_HEAD} differs from {embedding_name}, but config.json says that they are tied"
        )


def is_quantized(directory: str | Path) -> bool:
    """Whether its config.json says so. ValueError where that cannot be read."""
    return _read_text_config(Path(directory)).get(QUANTIZATION) is not None


def _read_text_config(directory: Path) -> dict[str, Any]:
    return get_text_config(read_json(directory / CONFIG), directory / CONFIG)


def read_dtype(directory: str | Path) -> torch.dtype:
    """The one that holds every tensor of the checkpoint but those that are wider by rule; of a quantised one, what
    config.json says that it was."""
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if is_quantized(directory):
        return by_name[find_original_dtype(_read_text_config(Path(directory)))]
    model, reader = ModelConfig(**read_model_fields(directory)), HfReader(Path(directory))
    family = HF_FAMILIES[model.family]
    names = {
        reader.dtypes[name]
        for name in family.compute_shapes(model)
        if family.wider is None or not family.wider.fullmatch(name)
    }
    return functools.reduce(torch.promote_types, (by_name[name] for name in sorted(names)))


def compute_base_fingerprint(model: ModelConfig, seed: int) -> str:
    """Identifies the base weights: the contents of the checkpoint's files, or the seed and shape they are drawn from.

    Reads every byte once (several files at a time), and none again while the files stay as they are; one process
    computes it and tells the others.
    """
    if model.checkpoint is None:
        return f"seed:{seed}:{hashlib.sha256(json.dumps(_describe_drawn(model)).encode()).hexdigest()[:16]}"
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = sorted(pool.map(find_sha256, find_weight_files(Path(model.checkpoint))))
    return "sha256:" + hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _describe_drawn(model: ModelConfig) -> list[object]:
    """What decides the weights that a seed gives; with the indexers, which are written with them."""
    shape: list[object] = [getattr(model, key) for key in (*_SIZES, "init_std")]
    if model.family != "gpt2":
        shape += [model.family, model.num_query_groups, model.head_dim, model.tied_output]
        shape += [model.rope_theta, sorted(model.rope_scaling.items())]
    if model.sliding_window is not None:
        shape += [model.sliding_window, model.full_attention_layers, model.local_rope_theta]
    if model.num_experts is not None:
        shape += [model.num_experts, model.experts_per_token, model.normalize_expert_weights]
    if model.architecture.shared_expert:
        shape += [model.has_qk_norm, *(getattr(model, key) for key in _EXPERT_SETTINGS)]
    kind = model.architecture
    for is_there, settings in (
        (kind.latent_attention, _LATENT_SETTINGS),
        (kind.sparse_attention, _INDEXER_SETTINGS),
        (kind.delta_layers, _DELTA_SETTINGS),
        (kind.bounded_gate, _GATE_SETTINGS),
    ):
        shape += [getattr(model, key) for key in settings if is_there]
    if model.attention_scale is not None:
        shape += [model.attention_scale]
    if model.architecture.partial_rotary:
        shape += [model.rotary_fraction, model.mlp_activation, model.has_parallel_residual]
    return shape + [[key, getattr(model, key)] for key, plain in _RARE.items() if getattr(model, key) != plain]
