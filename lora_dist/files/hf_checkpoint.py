"""A Hugging Face checkpoint directory: its files, its configuration, and what is wrong with it."""

import functools
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_dist.base_format import MXFP4_BLOCK
from lora_dist.config import ModelConfig
from lora_dist.files.directories import read_json
from lora_dist.files.fp8_blocks import (
    QUANTIZATION,
    dequantize_blocks,
    find_blocks,
    find_original_dtype,
    find_scales,
    read_block_size,
)
from lora_dist.files.hash_cache import find_sha256
from lora_dist.files.hf_families import HF_FAMILIES, MODEL_TYPES
from lora_dist.files.hf_gpt2 import PREFIX
from lora_dist.files.hf_layout import TIED_HEAD, HfFamily
from lora_dist.files.mxfp4_blocks import compute_shape, find_packed, is_mxfp4
from lora_dist.files.safetensors_stream import DTYPE_NAMES, TensorInfo, read_header, read_part
from lora_dist.quant.blocks import dequantize_mxfp4

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ROWS_AT_ONCE = 4096
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "max_position_embeddings")

_EXPERT_SETTINGS = (
    *("normalize_expert_weights", "expert_weight_scale", "num_expert_groups", "groups_per_token"),
    *("shared_ffn_size", "num_dense_layers", "dense_ffn_size"),
)
_GATE_SETTINGS = ("swiglu_alpha", "swiglu_limit")
_LATENT_SETTINGS = ("query_latent_size", "kv_latent_size", "rope_head_size", "value_head_size", "rope_interleaved")
_COMPARED = {
    **{key: key for key in ("family", *_SIZES, "layernorm_epsilon", "tied_output", "rope_theta", "rope_scaling")},
    **{key: key for key in ("rope_divisors", "rotary_fraction", "local_rope_theta", "attention_scale")},
    **{key: key for key in ("sliding_window", "full_attention_layers", *_LATENT_SETTINGS)},
    **{key: key for key in ("num_experts", "experts_per_token", *_EXPERT_SETTINGS, *_GATE_SETTINGS)},
    **{"num_kv_heads": "num_query_groups", "head_size": "head_dim", "parallel_residual": "has_parallel_residual"},
    **{"activation": "mlp_activation", "qk_norm": "has_qk_norm"},
}
"""Key of the configuration -> what of the model must be as config.json has it."""


class HfReader:
    """Finds tensors by their names without `transformer.`, in one file or several, and reads parts of them.

    What is stored in fp8 with scales appears as the one weight that it was, of the dtype that it had; what is in MXFP4
    as the one that it is, in bf16.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        """Reads every header; what is stored in fp8 or MXFP4 is dequantised on `device`.

        ValueError where a file is missing, damaged, or does not hold what the index says.
        """
        self.directory, self.shapes, self.dtypes, self._device = directory, {}, {}, device
        self._places: dict[str, TensorInfo] = {}
        for path in find_weight_files(directory):
            for stored_name, info in read_header(path).items():
                name = stored_name.removeprefix(PREFIX)
                if name in self._places:
                    raise ValueError(f"{path} holds {stored_name} a second time; {self._places[name].path} has it too")
                self._places[name] = info
                self.shapes[name], self.dtypes[name] = info.shape, info.dtype
        config = read_json(directory / CONFIG)
        files = {name: info.path for name, info in self._places.items()}
        self._packed = find_packed(self.shapes, self.dtypes, files)
        self._hide_codes(config)
        self._block_size = None if is_mxfp4(config) else read_block_size(config, directory / CONFIG)
        self._scales = find_scales(self.shapes, self.dtypes, files, self._block_size)
        for weight, scale in self._scales.items():
            self.dtypes[weight] = find_original_dtype(config)
            del self.shapes[scale], self.dtypes[scale]

    def _hide_codes(self, config: Mapping[str, Any]) -> None:
        if self._packed and not is_mxfp4(config):
            raise ValueError(
                f"{self.directory} holds {next(iter(self._packed))} in MXFP4, of which the {QUANTIZATION} in {CONFIG}"
                f" says nothing; copy {CONFIG} again"
            )
        for weight, parts in self._packed.items():
            self.shapes[weight], self.dtypes[weight] = compute_shape(self.shapes[parts[1]]), "BF16"
            for part in parts:
                del self.shapes[part], self.dtypes[part]

    def read(
        self, name: str, *, dim: int | None = None, start: int = 0, size: int | None = None, entry: int | None = None
    ) -> torch.Tensor:
        """As `read_part`, one tensor or a part of it, of MXFP4 an entry or a part; fp32 where it is stored in fp8."""
        if name in self._packed:
            assert entry is not None
            return self._read_packed(name, entry, dim, start, size)
        stored = self._read_stored(name, dim, start, size, entry)
        if name not in self._scales:
            return stored
        assert self._block_size is not None
        first, count, within = 0, None, [0, 0]
        if dim is not None:
            first, count = find_blocks(start, stored.shape[dim], self._block_size[dim])
            within[dim] = start - first * self._block_size[dim]
        scales = self._read_stored(self._scales[name], dim, first, count, entry)
        stored, scales = (part.to(self._device) for part in (stored, scales))
        return dequantize_blocks(stored, scales, self._block_size, (within[0], within[1]))

    def _read_packed(self, name: str, entry: int, dim: int | None, start: int, size: int | None) -> torch.Tensor:
        """[in, out] of one expert, whose codes are those of the transpose, with blocks along its rows."""
        if dim != 0:
            return self._dequantize(name, 0, start, size, entry).t()
        size = self.shapes[name][1] - start if size is None else size
        first, count = find_blocks(start, size, MXFP4_BLOCK)
        return self._dequantize(name, 1, first, count, entry).t().narrow(0, start - first * MXFP4_BLOCK, size)

    def _dequantize(self, name: str, dim: int, start: int, size: int | None, entry: int) -> torch.Tensor:
        parts = (self._read_stored(part, dim, start, size, entry) for part in self._packed[name])
        codes, scales = (part.to(self._device) for part in parts)
        return dequantize_mxfp4(codes.flatten(), scales, torch.bfloat16)

    def _read_stored(self, name: str, dim: int | None, start: int, size: int | None, entry: int | None) -> torch.Tensor:
        return read_part(self._places[name], dim=dim, start=start, size=size, entry=entry)


def find_weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files its index names. ValueError where there are none."""
    if not directory.is_dir():
        raise ValueError(f"model.checkpoint={directory} is not a directory")
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX).exists():
        raise ValueError(
            f"model.checkpoint={directory} holds neither {SINGLE_FILE} nor {INDEX};"
            " save the model as safetensors (save_pretrained does) or name another directory"
        )
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(type(name) is not str for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map; copy the checkpoint again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{directory / INDEX} names a file outside its directory: {outside[0]}")
    return [directory / name for name in names]


def read_model_fields(directory: str | Path) -> dict[str, Any]:
    """ModelConfig's fields as config.json gives them. ValueError for a model this project does not compute."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"model.checkpoint={directory} is not a directory")
    path = directory / CONFIG
    config = read_json(path)
    _check_setting(path, "model_type", config.get("model_type"), tuple(MODEL_TYPES))
    family = HF_FAMILIES[MODEL_TYPES[config["model_type"]]]
    if not (family.in_mxfp4 and is_mxfp4(config)):
        read_block_size(config, path)
    for key, (default, allowed) in family.settings.items():
        _check_setting(path, key, config.get(key, default), allowed)
    return {"name": directory.resolve().name, **family.read_fields(config, path), "checkpoint": str(directory)}


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
    expected = family.compute_shapes(model)
    found = {name for name in reader.shapes if not family.is_ignored(name, model.num_layers)}
    stacked = next((name for name in sorted(found - expected.keys()) if ".experts.gate_up_proj" in name), None)
    if stacked is not None:
        raise ValueError(
            f"{reader.directory}: {stacked} holds all experts of a layer, as transformers has them in memory; write the"
            " checkpoint with its save_pretrained(DIR, save_original_format=True), one tensor an expert"
        )
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


def read_dtype(directory: str | Path) -> torch.dtype:
    """The one that holds every tensor of the checkpoint but those that are wider by rule."""
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
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
        if model.architecture.latent_attention:
            shape += [getattr(model, key) for key in _LATENT_SETTINGS]
        if model.architecture.bounded_gate:
            shape += [getattr(model, key) for key in _GATE_SETTINGS]
        if model.attention_scale is not None:
            shape += [model.attention_scale]
        if model.architecture.partial_rotary:
            shape += [model.rotary_fraction, model.mlp_activation, model.has_parallel_residual]
        return f"seed:{seed}:{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]}"
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = sorted(pool.map(find_sha256, find_weight_files(Path(model.checkpoint))))
    return "sha256:" + hashlib.sha256("\n".join(hashes).encode()).hexdigest()
