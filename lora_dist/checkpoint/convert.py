"""Adapters of the store into other tools' files and back; one process, no model."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lora_dist.adapter_config import ImportConfig
from lora_dist.checkpoint.store import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Adapter,
    StoredAdapter,
    write_adapter_directory,
    write_tensors,
)
from lora_dist.files.bridge import to_bridge
from lora_dist.files.directories import open_new_directory, write_json
from lora_dist.files.imported import ImportedAdapter
from lora_dist.files.loralib import export_loralib, import_loralib
from lora_dist.files.loralib_settings import SETTINGS
from lora_dist.files.modules import list_linear_names
from lora_dist.files.peft_import import import_peft
from lora_dist.files.peft_layout import to_peft_files
from lora_dist.files.peft_split import to_peft_split
from lora_dist.lora.targets import DELTA_LINEARS, find_linear, is_mlp_beside_experts

LORALIB_WEIGHTS = "lora.pt"
_Files = tuple[dict[str, torch.Tensor], dict[str, Any]]


def import_adapter(config: ImportConfig, base_fingerprint: str) -> ImportedAdapter:
    """Read `config.source` and write `config.output`, in the source's dtype. ValueError for what does not fit."""
    source, model = Path(config.source), config.model
    if config.format == "peft":
        imported = import_peft(source, model, config.drop)
    else:
        imported = import_loralib(
            source, model, alpha=config.alpha, fused_targets=config.fused_targets, drop=config.drop
        )
    for name, value in imported.values.items():
        if not value.is_floating_point():
            raise ValueError(f"source={source}: {name} is {value.dtype}; only floating point is supported")
        if not value.isfinite().all():
            raise ValueError(f"source={source}: {name} holds values that are not finite; name another adapter")
    values = {name: value.float() for name, value in imported.values.items()}
    about = {"task": config.task_name, "step": 0, "metrics": {}, "source_format": config.format}
    write_adapter_directory(
        Path(config.output),
        Adapter(specs=imported.specs, bias=imported.bias, values=values, modules=imported.modules),
        model,
        about | {"source_names": imported.names},
        base_fingerprint=base_fingerprint,
        dtype=imported.dtype,
    )
    return imported


def export_adapter(stored: StoredAdapter, output: Path, format: str) -> None:
    """Write `stored` in another tool's format, in its own dtype. ValueError for what the format cannot say."""
    if stored.modules and format != "peft":
        raise ValueError(f"format={format} has no place for the modules {', '.join(stored.modules)}; use format=peft")
    if stored.specs[0].use_dora and format in _WITHOUT_DORA:
        raise ValueError(f"format={format} has no place for DoRA's magnitudes; use format=peft")
    _check_experts(stored, format)
    _check_delta_nets(stored, format)
    tensors, settings = _CONVERT[format](stored.read(), stored)
    weights_name, settings_name = _FILES[format]
    with open_new_directory(output) as temporary:
        if weights_name == LORALIB_WEIGHTS:  # what loralib's users torch.load
            buffer = BytesIO()  # torch.save to a full disk is a RuntimeError, whatever the system said
            torch.save({key: tensor.to(stored.dtype, copy=True) for key, tensor in tensors.items()}, buffer)
            (temporary / weights_name).write_bytes(buffer.getvalue())
        else:
            write_tensors(temporary / weights_name, tensors, stored.dtype)
        write_json(temporary / settings_name, settings)


def _check_experts(stored: StoredAdapter, format: str) -> None:
    """ValueError where the format cannot say which linears of a layer with experts are meant."""
    if format == "peft":
        return
    for spec in stored.specs:
        if spec.num_experts is not None:
            raise ValueError(f"format={format} has no place for adapters on experts ({spec.name}); use format=peft")
        if format in _WITHOUT_PARAMETERS and is_mlp_beside_experts(spec, stored.model):
            raise ValueError(
                f"format={format} has no place for adapters on MLPs beside experts ({spec.name}); use format=peft"
            )


def _check_delta_nets(stored: StoredAdapter, format: str) -> None:
    """ValueError for adapters that another tool has no name for, or not for each of what is one linear elsewhere."""
    for spec in stored.specs:
        is_inside = stored.model.has_delta_net(spec.layer) and find_linear(spec.target, stored.model) in DELTA_LINEARS
        is_fused = any(spec.target in fused for fused in stored.model.architecture.fused_targets)
        if is_inside and (format in _WITHOUT_DELTA_NETS or (format == "peft_split" and is_fused)):
            raise ValueError(
                f"format={format} has no place for adapters in gated DeltaNets ({spec.name}); use format=peft"
            )


def _to_peft(adapter: Adapter, stored: StoredAdapter) -> _Files:
    return to_peft_files(adapter.values, adapter.specs, stored.model, adapter.bias, adapter.modules)


def _to_peft_split(adapter: Adapter, stored: StoredAdapter) -> _Files:
    return to_peft_split(
        adapter.values,
        adapter.specs,
        bias=adapter.bias,
        names=stored.source_names or list_linear_names(stored.model),
        base_name=stored.model.checkpoint,
    )


def _to_loralib(adapter: Adapter, stored: StoredAdapter) -> _Files:
    return export_loralib(adapter.values, adapter.specs, stored.model, adapter.bias, stored.source_names)


def _to_bridge(adapter: Adapter, stored: StoredAdapter) -> _Files:
    return to_bridge(adapter.values, adapter.specs, stored.model, adapter.bias)


_CONVERT: dict[str, Callable[[Adapter, StoredAdapter], _Files]] = {
    "peft": _to_peft,
    "peft_split": _to_peft_split,
    "loralib": _to_loralib,
    "bridge": _to_bridge,
}
_WITHOUT_DORA = ("loralib", "bridge")
_WITHOUT_DELTA_NETS = ("loralib", "bridge")
_WITHOUT_PARAMETERS = ("loralib", "peft_split")
_FILES = {
    "peft": (PEFT_WEIGHTS, PEFT_CONFIG),
    "peft_split": (PEFT_WEIGHTS, PEFT_CONFIG),
    "loralib": (LORALIB_WEIGHTS, SETTINGS),
    "bridge": ("adapter.safetensors", "peft.json"),
}
"""Weights, and what a model has to be built with to take them."""
