"""A Hugging Face GPT-2 checkpoint directory: its files, its configuration, and what is wrong with it."""

import functools
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.directories import compute_sha256, read_json
from lora_dist.files.hf_gpt2 import IGNORED, PREFIX, TIED_HEAD, compute_hf_shapes
from lora_dist.files.safetensors_stream import DTYPE_NAMES, read_header, read_part

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ROWS_AT_ONCE = 4096
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "max_position_embeddings")

_REQUIRED_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "model_type": (None, ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "add_cross_attention": (False, (False,)),
    "quantization_config": (None, (None,)),
}
"""Key of config.json: what GPT-2 means where it is absent, and the values this project computes."""


class HfReader:
    """Finds tensors by their names without `transformer.`, in one file or several, and reads parts of them."""

    def __init__(self, directory: Path) -> None:
        """Reads every header. ValueError where a file is missing, damaged, or does not hold what the index says."""
        self.directory, self.shapes, self.dtypes = directory, {}, {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in find_weight_files(directory):
            for stored_name, info in read_header(path).items():
                name = stored_name.removeprefix(PREFIX)
                if name in self._places:
                    raise ValueError(f"{path} holds {stored_name} a second time; {self._places[name][0]} has it too")
                self._places[name] = (path, stored_name)
                self.shapes[name], self.dtypes[name] = info.shape, info.dtype

    def read(self, name: str, *, dim: int | None = None, start: int = 0, size: int | None = None) -> torch.Tensor:
        """One tensor, or `size` entries of it from `start` along `dim`."""
        path, stored_name = self._places[name]
        return read_part(path, stored_name, dim=dim, start=start, size=size)


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
    if not isinstance(weight_map, dict) or not weight_map:
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
    config = read_json(directory / CONFIG)
    for key, (default, allowed) in _REQUIRED_SETTINGS.items():
        value = config.get(key, default)
        if value not in allowed:
            raise ValueError(
                f"{directory / CONFIG}: {key}={value!r} is not supported, only {' or '.join(map(repr, allowed))};"
                " name a GPT-2 checkpoint that has it"
            )
    hidden_size = _get(config, "n_embd", directory)
    return {
        "name": directory.resolve().name,
        "num_layers": _get(config, "n_layer", directory),
        "hidden_size": hidden_size,
        "num_heads": _get(config, "n_head", directory),
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden_size,
        "vocab_size": _get(config, "vocab_size", directory),
        "max_position_embeddings": _get(config, "n_positions", directory),
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "hidden_dropout": config.get("resid_pdrop", 0.1),
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "init_std": config.get("initializer_range", 0.02),
        "checkpoint": str(directory),
    }


def describe_hf_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that ModelConfig decides; the inverse of `read_model_fields`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


def _get(config: Mapping[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{directory / CONFIG}: {key}={value!r} is not a positive integer")
    return value


def check_hf_checkpoint(model: ModelConfig, directory: str | Path) -> None:
    """ValueError, one line, where the directory's files are not whole or not this model's. Needs no process group."""
    directory = Path(directory)
    fields = read_model_fields(directory)
    for key in (*_SIZES, "layernorm_epsilon"):
        _check_field(key, getattr(model, key), fields[key], directory)
    reader = HfReader(directory)
    _check_tensors(reader, compute_hf_shapes(model))
    _check_tied_head(reader)


def _check_field(key: str, wanted: object, found: object, directory: Path) -> None:
    if wanted != found:
        raise ValueError(
            f"model.{key}={wanted} but {directory / CONFIG} has {found};"
            f" set model.{key}={found} or name another checkpoint"
        )


def _check_tensors(reader: HfReader, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name for name in reader.shapes if not IGNORED.fullmatch(name)} - {TIED_HEAD}
    for name in expected:
        if name not in found:
            raise ValueError(f"{reader.directory} has no tensor {name}; the checkpoint is incomplete or no GPT-2")
    unknown = sorted(found - expected.keys())
    if unknown:
        raise ValueError(f"{reader.directory} holds {unknown[0]} ({len(unknown)} in all), which GPT-2 does not have")
    for name, shape in expected.items():
        if reader.shapes[name] != shape:
            raise ValueError(f"{reader.directory}: {name} has shape {reader.shapes[name]}, config.json says {shape}")
        if reader.dtypes[name] not in DTYPE_NAMES.values():
            raise ValueError(f"{reader.directory}: {name} is {reader.dtypes[name]}; only floating point is supported")


def _check_tied_head(reader: HfReader) -> None:
    """A stored output layer must be the embedding again: it is tied here, and another one would be dropped silently."""
    if TIED_HEAD not in reader.shapes:
        return
    num_rows = reader.shapes["wte.weight"][0]
    same = reader.shapes[TIED_HEAD] == reader.shapes["wte.weight"]
    for start in range(0, num_rows if same else 0, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, num_rows - start)
        head, embedding = (reader.read(name, dim=0, start=start, size=size) for name in (TIED_HEAD, "wte.weight"))
        same = same and torch.equal(head, embedding)
    if not same:
        raise ValueError(
            f"{reader.directory}: {TIED_HEAD} differs from wte.weight; only tied output layers are supported"
        )


def read_dtype(directory: str | Path) -> torch.dtype:
    """The one that holds every tensor of the checkpoint."""
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    reader = HfReader(Path(directory))
    dtypes = {by_name[name] for key, name in reader.dtypes.items() if not IGNORED.fullmatch(key)}
    return functools.reduce(torch.promote_types, dtypes)


def compute_base_fingerprint(model: ModelConfig, seed: int) -> str:
    """Identifies the base weights: the contents of the checkpoint's files, or the seed and shape they are drawn from.

    Reads every byte once (several files at a time), so one process computes it and tells the others.
    """
    if model.checkpoint is None:
        shape = [getattr(model, key) for key in (*_SIZES, "init_std")]
        return f"seed:{seed}:{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]}"
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = sorted(pool.map(compute_sha256, find_weight_files(Path(model.checkpoint))))
    return "sha256:" + hashlib.sha256("\n".join(hashes).encode()).hexdigest()
