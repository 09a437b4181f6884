"""What was trained, as files: an adapter with its head that PEFT loads, or a whole Hugging Face checkpoint; back.

A LoRA's directory is PEFT's for sequence classification (the head under modules_to_save); BitFit's holds the model's
own names. One adapter on DeBERTa's fused projection holds those of q, k and v: A stacked, B in blocks.

Shapes: A [R, H], B [O, R].
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lora_dist.checkpoint.store import ENCODER_KIND, PEFT_CONFIG, PEFT_WEIGHTS, describe_versions, write_tensors
from lora_dist.classify_config import ClassifyConfig
from lora_dist.encoders.adapt import FACTORS, AdaptedLinear, describe_trained
from lora_dist.encoders.model import Encoder
from lora_dist.files.directories import (
    MANIFEST,
    open_new_directory,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from lora_dist.files.loralib import read_state_dict
from lora_dist.files.peft_config import describe_peft_config
from lora_dist.files.tokenizer_files import copy_tokenizer
from lora_dist.lora.layer import LoraShard
from lora_dist.lora.spec import AdapterSpec

PREFIX = "base_model.model."
Values = Mapping[str, torch.Tensor]
"""Whole fp32 tensors by the names of `describe_trained`."""


def write_trained(
    directory: Path, encoder: Encoder, config: ClassifyConfig, values: Values, about: Mapping[str, Any]
) -> None:
    """One process writes; what stood in `directory` is replaced once the new one is whole.

    `about` is what the manifest says: base_fingerprint, labels, task, step, metrics.
    """
    with open_new_directory(directory) as temporary:
        tensors = {key: tensor.contiguous() for key, tensor in _to_file(encoder, config, values).items()}
        weights = "model.safetensors" if config.method == "full" else PEFT_WEIGHTS
        hashes = {weights: write_tensors(temporary / weights, tensors, torch.float32)}
        if config.method == "full":
            _write_model_config(temporary, encoder, config, about)
        else:
            hashes[PEFT_CONFIG] = write_json(temporary / PEFT_CONFIG, _describe_adapter(encoder, config))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = {"kind": ENCODER_KIND, "method": config.method, **about, "base": config.encoder.name}
        if config.method != "full":
            specs = [spec for shard in list_shards(encoder).values() for spec in shard.specs]
            manifest["adapters"] = {spec.name: {"lora_rank": spec.lora_rank, "alpha": spec.alpha} for spec in specs}
        write_manifest(temporary, hashes, {**manifest, "created": created, "versions": describe_versions()})


def read_trained_labels(config: ClassifyConfig) -> tuple[str, ...] | None:
    """What the head that is scored says, in its outputs' order: the file to score may lack some. None where no file of
    the adapter, or of the checkpoint, tells.
    """
    if config.adapter is not None:
        manifest = Path(config.adapter) / MANIFEST
        return tuple(read_json(manifest).get("labels", ())) or None if manifest.is_file() else None
    names = read_json(Path(config.encoder.checkpoint) / "config.json").get("id2label", {})
    words = tuple(names[number] for number in sorted(names, key=int))
    return None if all(re.fullmatch(r"LABEL_\d+", word) for word in words) else words


def _to_file(encoder: Encoder, config: ClassifyConfig, values: Values) -> dict[str, torch.Tensor]:
    if config.method != "lora":
        return dict(values)
    tensors = {}
    shards = list_shards(encoder)
    for module, shard in shards.items():
        a_RH, b_OR = stack(shard, values)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a_RH, b_OR
    factors = {f"{spec.name}.{kind}" for shard in shards.values() for spec in shard.specs for kind in FACTORS}
    return tensors | {f"{PREFIX}{name}": tensor for name, tensor in values.items() if name not in factors}


def list_shards(encoder: Encoder) -> dict[str, LoraShard]:
    """The adapters by the name of their linear in the model."""
    modules = encoder.model.named_modules()
    return {name: module.lora for name, module in modules if isinstance(module, AdaptedLinear)}


def stack(shard: LoraShard, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """One A and B of everything on a linear."""
    pairs = [(values[f"{spec.name}.lora_A"], values[f"{spec.name}.lora_B"]) for spec in shard.specs]
    if shard.stacked_rows is None:
        return pairs[0]
    block = torch.block_diag(*(b for _, b in pairs))
    b_OR = block.new_zeros(shard.local_out_features, block.shape[1])
    return torch.cat([a for a, _ in pairs]), b_OR.index_copy(0, shard.stacked_rows.cpu(), block)


def unstack(shard: LoraShard, a_RH: torch.Tensor, b_OR: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inverse of `stack`."""
    values, ranks = {}, [spec.lora_rank for spec in shard.specs]
    columns = zip(shard.list_rows(), a_RH.split(ranks), b_OR.split(ranks, dim=1), strict=True)
    for (spec, rows), a, b in columns:
        values[f"{spec.name}.lora_A"] = a
        values[f"{spec.name}.lora_B"] = b if rows is None else b[rows.cpu()]
    return values


def _describe_adapter(encoder: Encoder, config: ClassifyConfig) -> dict[str, Any]:
    if config.method != "lora":
        return {"method": config.method}
    modules, shards = {}, list_shards(encoder)
    for name, shard in shards.items():
        lora_rank = sum(spec.lora_rank for spec in shard.specs)
        modules[name] = (lora_rank, _compute_alpha(shard.specs, lora_rank))
    first = next(iter(shards.values())).specs[0]
    described = describe_peft_config(
        modules, first, bias="none", base_name=config.encoder.checkpoint, fan_in_fan_out=False
    )
    return described | {"task_type": "SEQ_CLS", "modules_to_save": list(encoder.family.head)}


def _compute_alpha(specs: Sequence[AdapterSpec], lora_rank: int) -> float:
    """What gives the adapters' own scaling at the summed rank."""
    first = specs[0]
    return first.scaling * (lora_rank**0.5 if first.rank_stabilized else lora_rank)


def _write_model_config(directory: Path, encoder: Encoder, config: ClassifyConfig, about: Mapping[str, Any]) -> None:
    """config.json with the labels, and the tokenizer's files."""
    base = Path(config.encoder.checkpoint)
    content = read_json(base / "config.json")
    words = list(about["labels"]) or ["LABEL_0"]
    names = {"id2label": dict(enumerate(words)), "label2id": {word: number for number, word in enumerate(words)}}
    write_json(directory / "config.json", content | names | {"architectures": [type(encoder.model).__name__]})
    copy_tokenizer(base, directory)


@torch.no_grad()
def load_trained(encoder: Encoder, config: ClassifyConfig, labels: Sequence[str], base_fingerprint: str) -> None:
    """Fill the factors (or biases) and, unless config.adapter_head is false, the head.

    ValueError, naming the key, for a file that does not fit, another base, or other labels.
    """
    assert config.adapter is not None
    path = Path(config.adapter)
    tensors = _read(path)
    if path.is_dir():
        _check_manifest(path, config, labels, base_fingerprint)
        _check_scaling(path, encoder, config)
    values = _read_factors(path, encoder, tensors) | tensors
    trained: dict[str, torch.Tensor] = {one.name: one.parameter for one in describe_trained(encoder)}
    if not config.adapter_head:
        values, trained = (_drop_head(encoder, tensors) for tensors in (values, trained))
    for name in sorted(trained.keys() ^ values.keys()):
        if name in trained:
            raise ValueError(f"adapter={path} has no {name}; adapter_head=false begins with a new head")
        raise ValueError(f"adapter={path} holds {name}, which this job does not train; check lora.target_modules")
    for name, parameter in trained.items():
        _copy(path, name, parameter, values[name])


def _drop_head(encoder: Encoder, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not encoder.is_head(name)}


def _check_manifest(path: Path, config: ClassifyConfig, labels: Sequence[str], base_fingerprint: str) -> None:
    """Of a directory that PEFT wrote there is none."""
    if not (path / "manifest.json").is_file():
        return
    manifest = read_manifest(path)
    expected = {"method": config.method, "base_fingerprint": base_fingerprint}
    if config.adapter_head:
        expected["labels"] = list(labels)  # type: ignore[assignment]
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise ValueError(f"adapter={path}: {key} is {manifest.get(key)!r}, this job has {value!r}")


def _check_scaling(path: Path, encoder: Encoder, config: ClassifyConfig) -> None:
    """ValueError where the file's factors are scaled otherwise than this job would scale them."""
    expected, found = _describe_adapter(encoder, config), read_json(path / PEFT_CONFIG)
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        if key in expected and found.get(key, expected[key]) != expected[key]:
            raise ValueError(
                f"adapter={path}: {key} is {found[key]}, lora.rank, lora.alpha and lora.use_rslora of this job make it"
                f" {expected[key]}"
            )


def _read(path: Path) -> dict[str, torch.Tensor]:
    """By the model's own names."""
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        whole = f"encoder.checkpoint={path}/model, which it has" if (path / "model").is_dir() else "a run of `classify`"
        raise ValueError(f"adapter={path} has no {PEFT_WEIGHTS}; give {whole}, or PEFT's or loralib's file")
    tensors = {}
    for key, tensor in read_state_dict(file).items():
        name = key.removeprefix(PREFIX)
        tensors[name.removesuffix(".weight") if ".lora_" in name else name] = tensor.float()
    return tensors


def _read_factors(path: Path, encoder: Encoder, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Taken out of `tensors`."""
    values: dict[str, torch.Tensor] = {}
    for module, shard in list_shards(encoder).items():
        a_RH, b_OR = (tensors.pop(f"{module}.{kind}", None) for kind in FACTORS)
        if a_RH is None or b_OR is None:
            raise ValueError(f"adapter={path} has no {module}.lora_A and lora_B; lora.target_modules has to match it")
        lora_rank = sum(spec.lora_rank for spec in shard.specs)
        if a_RH.shape[0] != lora_rank or b_OR.shape[1] != lora_rank:
            raise ValueError(f"adapter={path}: {module} has rank {a_RH.shape[0]}, lora.rank makes {lora_rank}")
        values |= unstack(shard, a_RH, b_OR)
    return values


def _copy(path: Path, name: str, parameter: torch.Tensor, value: torch.Tensor) -> None:
    shape = tuple(parameter.shape)
    if shape != tuple(value.shape):
        raise ValueError(f"adapter={path}: {name} has shape {tuple(value.shape)}, this model needs {shape}")
    parameter.copy_(value)
