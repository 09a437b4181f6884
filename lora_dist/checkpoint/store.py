"""An adapter's directory: whole factors in PEFT's files and a manifest that says of which base; no process group.

adapter_model.safetensors and adapter_config.json are what HF PEFT loads. adapter_factors.safetensors keeps each
projection's own factors under canonical names, without the zeros of PEFT's stacked B: 2 bytes x lora_rank x (in + out)
an adapter in fp16, 37.75 MB for GPT-3 175B at rank 4 on q and v (twice that in fp32), against 75.5 MB stacked. It is
written alone with `layout=compact`, and beside PEFT's files where q, k and v differ in scaling, which PEFT's one
scaling a module can only hold rounded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.checkpoint.identity import check_same
from lora_dist.config import ModelConfig
from lora_dist.files.directories import MANIFEST, open_new_directory, read_manifest, write_json, write_manifest
from lora_dist.files.hf_gpt2 import QKV_TARGETS
from lora_dist.files.peft_layout import (
    compute_factor_shapes,
    compute_peft_shapes,
    find_folded_scalings,
    from_peft_tensors,
    to_peft_files,
)
from lora_dist.files.safetensors_stream import DTYPE_NAMES, open_writer, read_header
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import compute_linear_shapes, find_num_experts
from lora_dist.lora.trained_base import list_trained_base
from lora_dist.saved_modules import check_saved_modules

ENCODER_KIND = "encoder"
"""What the manifest of an adapter of `lora-dist classify` says it is."""
PEFT_CONFIG, PEFT_WEIGHTS, FACTORS = "adapter_config.json", "adapter_model.safetensors", "adapter_factors.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The adapters of one task on the whole model."""

    specs: Sequence[AdapterSpec]
    bias: str
    """none, lora_only or all: which biases `values` holds too."""
    values: Mapping[str, torch.Tensor]
    """Whole fp32 tensors by canonical name: `layers.3.q_proj.lora_A`."""
    modules: Sequence[str] = ()
    """Modules of the base (lora.modules_to_save) that `values` holds too."""


def write_adapter_directory(
    directory: Path,
    adapter: Adapter,
    model: ModelConfig,
    about: Mapping[str, Any],
    *,
    base_fingerprint: str,
    layout: str = "peft",
    dtype: torch.dtype = torch.float32,
) -> None:
    """One process writes; what stood in `directory` is replaced once the new one is whole.

    `about` is what the manifest says beside: task, step, metrics. fp32 files hold the values bit for bit.
    """
    specs, bias = adapter.specs, adapter.bias
    with open_new_directory(directory) as temporary:
        hashes = _write_files(temporary, adapter, model, layout, dtype)
        manifest = describe_adapter(specs, bias, base_fingerprint, adapter.modules) | dict(about)
        manifest |= {"base": model.name, "base_format": model.base_format}
        manifest |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        manifest |= {"dtype": DTYPE_NAMES[dtype], "versions": describe_versions()}
        manifest |= {"scaling_folded_into_peft_lora_B": find_folded_scalings(specs, model)}
        write_manifest(temporary, hashes, manifest)


def _write_files(
    directory: Path, adapter: Adapter, model: ModelConfig, layout: str, dtype: torch.dtype
) -> dict[str, str]:
    """The tensors, and PEFT's configuration beside PEFT's tensors; their hashes by file name."""
    specs, bias, hashes = adapter.specs, adapter.bias, {}
    if layout == "peft":
        tensors, about = to_peft_files(adapter.values, specs, model, bias, adapter.modules)
        hashes[PEFT_WEIGHTS] = write_tensors(directory / PEFT_WEIGHTS, tensors, dtype)
        hashes[PEFT_CONFIG] = write_json(directory / PEFT_CONFIG, about)
    if layout == "compact" or find_folded_scalings(specs, model):
        hashes[FACTORS] = write_tensors(directory / FACTORS, adapter.values, dtype)
    return hashes


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """One safetensors file; its sha256."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with open_writer(path, shapes, dtype) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.close()


def describe_adapter(
    specs: Sequence[AdapterSpec], bias: str, base_fingerprint: str, modules: Sequence[str] = ()
) -> dict[str, Any]:
    """What must agree between the adapter in a file and the one in the model, by the names used in errors."""
    return {
        "base_fingerprint": base_fingerprint,
        "bias": bias,
        "use_rslora": specs[0].rank_stabilized,
        "use_dora": specs[0].use_dora,
        "modules_to_save": sorted(modules),
        "shared_lora_A": sorted(spec.name for spec in specs if spec.shares_a),
        "adapters": {spec.name: {"lora_rank": spec.lora_rank, "alpha": spec.alpha} for spec in specs},
    }


def describe_versions() -> dict[str, str]:
    """This package's and torch's; `unknown` where the package runs from a source tree."""
    try:
        own = version("lora_dist")
    except PackageNotFoundError:
        own = "unknown"
    return {"lora_dist": own, "torch": torch.__version__}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """A directory whose files are whole and fit the model; nothing but headers is read yet."""

    directory: Path
    manifest: dict[str, Any]
    specs: list[AdapterSpec]
    bias: str
    modules: list[str]
    model: ModelConfig
    dtype: torch.dtype
    """Of the file's tensors."""

    @property
    def source_names(self) -> dict[str, str]:
        """Target -> name template of its linear in the tool that it was imported from."""
        return dict(self.manifest.get("source_names", {}))

    @property
    def needs_merge(self) -> bool:
        """True where it changes what all rows of a batch share: biases or modules that are trained, rows that DoRA
        scales."""
        return self.bias != "none" or bool(self.modules) or self.specs[0].use_dora

    def read(self) -> Adapter:
        """ValueError where a value is not finite."""
        path, has_factors = _find_weights(self.directory, self.manifest)
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds values that are not finite; name another adapter")
        values = tensors
        if not has_factors:
            values = from_peft_tensors(tensors, self.specs, self.model, self.bias, self.modules)
        return Adapter(specs=self.specs, bias=self.bias, values=values, modules=self.modules)


def open_adapter(directory: Path, *, model: ModelConfig, base_fingerprint: str) -> StoredAdapter:
    """ValueError, naming key and both values, for a damaged file, another base, or tensors that do not fit."""
    if not directory.is_dir():
        raise ValueError(f"adapter {directory} is not a directory")
    if not (directory / MANIFEST).exists() and (directory / PEFT_CONFIG).exists():
        raise ValueError(f"adapter {directory} has no {MANIFEST}: a PEFT adapter from elsewhere; lora-dist import it")
    manifest = read_manifest(directory)
    if manifest.get("kind") == ENCODER_KIND:
        raise ValueError(f"adapter {directory} is an encoder's; lora-dist classify adapter={directory} takes it")
    if "method" in manifest:
        raise ValueError(f"adapter {directory} is of method={manifest['method']}; only LoRA's can be used so")
    check_same({"base_fingerprint": base_fingerprint}, manifest, directory)
    manifest["shared_lora_A"] = _list_shared(manifest)
    specs = parse_specs(directory, manifest, model)
    bias = manifest.get("bias")
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"{directory / MANIFEST}: bias is {bias!r}, not one of none, lora_only, all")
    modules = manifest.get("modules_to_save", [])
    check_saved_modules(f"{directory / MANIFEST}: modules_to_save", modules, model)
    path, has_factors = _find_weights(directory, manifest)
    compute_shapes = _compute_factor_shapes if has_factors else compute_peft_shapes
    dtype = check_tensors(path, compute_shapes(specs, model, bias, modules))
    return StoredAdapter(
        directory=directory, manifest=manifest, specs=specs, bias=bias, modules=modules, model=model, dtype=dtype
    )


def parse_specs(directory: Path, manifest: Mapping[str, Any], model: ModelConfig) -> list[AdapterSpec]:
    """The adapters that a manifest lists, in `model`. ValueError for a layer or linear that the model has not."""
    specs = []
    adapters = manifest.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        raise ValueError(f"{directory / MANIFEST} lists no adapters")
    shared = _list_shared(manifest)
    for name, entry in adapters.items():
        found = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
        layer = model.num_layers if found is None else int(found[1])
        shapes = compute_linear_shapes(model, layer) if layer < model.num_layers else {}
        if found is None or found[2] not in shapes:
            raise ValueError(f"{directory / MANIFEST}: {model.name} has no {name}; it has {model.num_layers} layers")
        lora_rank, alpha = (entry.get(key) if isinstance(entry, dict) else None for key in ("lora_rank", "alpha"))
        if not (isinstance(lora_rank, int) and lora_rank >= 1 and isinstance(alpha, int | float)):
            raise ValueError(f"{directory / MANIFEST}: {name} is {entry!r}, not a lora_rank and an alpha")
        in_features, out_features = shapes[found[2]]
        specs.append(
            AdapterSpec(
                layer=layer,
                target=found[2],
                lora_rank=lora_rank,
                alpha=alpha,
                in_features=in_features,
                out_features=out_features,
                rank_stabilized=bool(manifest.get("use_rslora")),
                use_dora=bool(manifest.get("use_dora")),
                shares_a=name in shared,
                num_experts=find_num_experts(found[2], model, layer),
            )
        )
    return specs


def _list_shared(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the adapters that have one A with others; older manifests number the layers whose q, k and v do."""
    names: list[str] = []
    for entry in manifest.get("shared_lora_A", ()):
        names += [f"layers.{entry}.{target}" for target in QKV_TARGETS] if isinstance(entry, int) else [entry]
    return sorted(names)


def _find_weights(directory: Path, manifest: Mapping[str, Any]) -> tuple[Path, bool]:
    """The file that holds the values bit for bit, and whether that is the compact one."""
    has_factors = FACTORS in manifest["sha256"]
    name = FACTORS if has_factors else PEFT_WEIGHTS
    if name not in manifest["sha256"]:
        raise ValueError(f"{directory / MANIFEST} lists neither {FACTORS} nor {PEFT_WEIGHTS}")
    return directory / name, has_factors


def _compute_factor_shapes(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    base_shapes, names = compute_canonical_shapes(model), list_trained_base(specs, model, bias, modules)
    return compute_factor_shapes(specs, model) | {name: base_shapes[name] for name in names}


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> torch.dtype:
    """The tensors' dtype; they are written in one."""
    header = read_header(path)
    found = {name: info.shape for name, info in header.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} has shape {found.get(name, 'none')}, the model needs {expected.get(name, 'none')}"
            )
        if header[name].dtype not in DTYPE_NAMES.values():
            raise ValueError(f"{path}: {name} is {header[name].dtype}, not one of {', '.join(DTYPE_NAMES.values())}")
    names = {info.dtype for info in header.values()}
    if len(names) > 1:
        raise ValueError(f"{path} mixes {' and '.join(sorted(names))}")
    return {name: dtype for dtype, name in DTYPE_NAMES.items()}[names.pop()]
