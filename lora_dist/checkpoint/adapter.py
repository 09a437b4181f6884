"""The adapter store: whole factors in PEFT's files, whatever the topology, with a manifest that says of which base.

adapter_model.safetensors and adapter_config.json are what HF PEFT loads. adapter_factors.safetensors keeps each
projection's own factors under canonical names, without the zeros of PEFT's stacked B: 2 bytes x lora_rank x (in + out)
an adapter in fp16, 37.75 MB for GPT-3 175B at rank 4 on q and v (twice that in fp32), against 75.5 MB stacked. It is
written alone with `layout=compact`, and beside PEFT's files where q, k and v differ in scaling, which PEFT's one
scaling a module can only hold rounded.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.checkpoint.identity import check_same
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.files.directories import open_new_directory, read_manifest, write_json, write_manifest
from lora_dist.files.hf_gpt2 import compute_hf_shapes, find_hf_tensor
from lora_dist.files.peft_gpt2 import (
    build_adapter_config,
    compute_peft_shapes,
    from_peft_tensors,
    group_specs,
    list_bias_names,
    to_peft_tensors,
)
from lora_dist.files.safetensors_stream import DTYPE_NAMES, open_writer, read_header
from lora_dist.lora.spec import AdapterSpec
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.whole import ReadState, cut_shard, iterate_model, list_whole, write_together

PEFT_CONFIG, PEFT_WEIGHTS, FACTORS = "adapter_config.json", "adapter_model.safetensors", "adapter_factors.safetensors"


def write_adapter(
    directory: str | Path,
    *,
    trainable: Sequence[TrainableParameter],
    specs: Sequence[AdapterSpec],
    topology: Topology,
    config: RunConfig,
    read: ReadState,
    base_fingerprint: str,
    step: int,
    metrics: Mapping[str, float | None],
    layout: str = "peft",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Every process calls it; global rank 0 writes. What stood in `directory` is replaced once the new one is whole.

    `read` gives a parameter's local fp32 "value" (`ZeroEngine.read_state`, or `whole.read_value`). fp32 files hold
    what was trained bit for bit. OSError, on every process, where the directory cannot be written.
    """
    entries = list_whole(trainable, topology)
    stream = iterate_model(entries, trainable, topology, lambda one: {"value": read(one)["value"]}, torch.float32)

    def write() -> None:
        values = {name: whole for name, whole in stream if whole is not None}
        with open_new_directory(Path(directory)) as temporary:
            hashes = _write_files(temporary, values, specs, config, layout, dtype)
            about = describe_adapter(specs, config, base_fingerprint) | {"step": step, "metrics": dict(metrics)}
            about |= {"dtype": DTYPE_NAMES[dtype], "versions": describe_versions()}
            about |= {"scaling_folded_into_peft_lora_B": _find_folded_scalings(specs)}
            write_manifest(temporary, hashes, about)

    write_together(write if topology.global_rank == 0 else None, stream)


def _write_files(
    directory: Path,
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    config: RunConfig,
    layout: str,
    dtype: torch.dtype,
) -> dict[str, str]:
    """The tensors, and PEFT's configuration beside PEFT's tensors; their hashes by file name."""
    hashes = {}
    if layout == "peft":
        tensors = to_peft_tensors(values, specs, config.model, config.lora.bias)
        hashes[PEFT_WEIGHTS] = _write_tensors(directory / PEFT_WEIGHTS, tensors, dtype)
        about = build_adapter_config(specs, bias=config.lora.bias, base_name=config.model.checkpoint)
        hashes[PEFT_CONFIG] = write_json(directory / PEFT_CONFIG, about)
    if layout == "compact" or _find_folded_scalings(specs):
        hashes[FACTORS] = _write_tensors(directory / FACTORS, values, dtype)
    return hashes


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    with open_writer(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.close()


def _find_folded_scalings(specs: Sequence[AdapterSpec]) -> dict[str, float]:
    return {name: ratio for module in group_specs(specs) for name, ratio in module.compute_folded_ratios().items()}


def describe_adapter(specs: Sequence[AdapterSpec], config: RunConfig, base_fingerprint: str) -> dict[str, Any]:
    """What must agree between the adapter in a file and the one in the model, by the names used in errors."""
    return {
        "base_fingerprint": base_fingerprint,
        "bias": config.lora.bias,
        "adapters": {spec.name: {"lora_rank": spec.lora_rank, "alpha": spec.alpha} for spec in specs},
    }


def describe_versions() -> dict[str, str]:
    """This package's and torch's; `unknown` where the package runs from a source tree."""
    try:
        own = version("lora_dist")
    except PackageNotFoundError:
        own = "unknown"
    return {"lora_dist": own, "torch": torch.__version__}


@torch.no_grad()
def load_adapter(
    directory: str | Path,
    *,
    trainable: Sequence[TrainableParameter],
    specs: Sequence[AdapterSpec],
    topology: Topology,
    config: RunConfig,
    base_fingerprint: str,
) -> dict[str, Any]:
    """Fill this process's factors and biases before an optimizer is built over them; returns the manifest.

    Nothing is changed unless the whole file fits: ValueError for a damaged file, another base, another adapter.
    """
    manifest, values = read_adapter(Path(directory), specs=specs, config=config, base_fingerprint=base_fingerprint)
    for one in trainable:
        if one.owned:
            assert tuple(values[one.name].shape) == one.full_shape
            one.parameter.copy_(cut_shard(values[one.name], one, topology))
    return manifest


def read_adapter(
    directory: Path, *, specs: Sequence[AdapterSpec], config: RunConfig, base_fingerprint: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The manifest, and whole fp32 values by canonical name. Needs no process group."""
    manifest = read_manifest(directory)
    model, bias = config.model, config.lora.bias
    check_same(describe_adapter(specs, config, base_fingerprint), manifest, directory)
    has_factors = FACTORS in manifest["sha256"]
    path = directory / (FACTORS if has_factors else PEFT_WEIGHTS)
    _check_shapes(path, (_compute_factor_shapes if has_factors else compute_peft_shapes)(specs, model, bias))
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    return manifest, tensors if has_factors else from_peft_tensors(tensors, specs, model, bias)


def _compute_factor_shapes(specs: Sequence[AdapterSpec], model: ModelConfig, bias: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes[f"{spec.name}.lora_A"] = (spec.lora_rank, spec.in_features)
        shapes[f"{spec.name}.lora_B"] = (spec.out_features, spec.lora_rank)
    hf_shapes = compute_hf_shapes(model)
    return shapes | {name: hf_shapes[find_hf_tensor(name).name] for name in list_bias_names(specs, model, bias)}


def _check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: info.shape for name, info in read_header(path).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} has shape {found.get(name, 'none')}, the model needs {expected.get(name, 'none')}"
            )
