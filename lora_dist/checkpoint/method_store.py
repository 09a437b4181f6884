"""The directory of a method that is neither LoRA nor full fine-tuning: whole trained tensors, topology-free.

adapter_model.safetensors holds them in fp32, BitFit's biases under PEFT's names and in Hugging Face's layout, others
under their canonical names; adapter_config.json says the method and its options, the manifest of which base, when, how
good, and every file's sha256.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BOTTLENECK_METHODS, BottleneckConfig
from lora_dist.checkpoint.identity import check_same
from lora_dist.checkpoint.store import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    check_tensors,
    describe_versions,
    parse_specs,
    write_tensors,
)
from lora_dist.config import ModelConfig
from lora_dist.files.directories import (
    MANIFEST,
    open_new_directory,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from lora_dist.files.peft_base import compute_base_shapes, from_peft_base, to_peft_base
from lora_dist.files.peft_layout import compute_factor_shapes
from lora_dist.lora.spec import AdapterSpec
from lora_dist.parameters import TrainableParameter
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS, PrefixConfig
from lora_dist.refusals import require_one_of
from lora_dist.topology import Topology
from lora_dist.whole import ReadState, cut_shard, iterate_model, list_whole, write_together

METHOD_KIND = "method"
"""What the manifest of such a directory says it is."""


def write_method(
    directory: Path,
    *,
    options: Mapping[str, Any],
    trainable: Sequence[TrainableParameter],
    topology: Topology,
    model: ModelConfig,
    read: ReadState,
    about: Mapping[str, Any],
) -> None:
    """Every process calls it; global rank 0 writes. What stood in `directory` is replaced once the new one is whole.

    `options` is `describe_method`'s, `about` what the manifest says beside: base_fingerprint, task, step, metrics.
    OSError, on every process, where the directory cannot be written.
    """
    entries = list_whole(trainable, topology)
    stream = iterate_model(entries, trainable, topology, lambda one: {"value": read(one)["value"]}, torch.float32)

    def write() -> None:
        values = {name: whole for name, whole in stream if whole is not None}
        tensors = to_peft_base(values, [], model, "all", ()) if options["method"] == "bitfit" else values
        with open_new_directory(directory) as temporary:
            hashes = {PEFT_WEIGHTS: write_tensors(temporary / PEFT_WEIGHTS, tensors, torch.float32)}
            hashes[PEFT_CONFIG] = write_json(temporary / PEFT_CONFIG, options)
            created = datetime.now(UTC).isoformat(timespec="seconds")
            manifest = {
                "kind": METHOD_KIND,
                **options,
                **about,
                "base": model.name,
                "created": created,
                "versions": describe_versions(),
            }
            write_manifest(temporary, hashes, manifest)

    write_together(write if topology.global_rank == 0 else None, stream)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMethod:
    """A directory whose files are whole and fit the model; nothing but headers is read yet."""

    directory: Path
    manifest: dict[str, Any]
    model: ModelConfig

    @property
    def method(self) -> str:
        return str(self.manifest["method"])

    @property
    def bottleneck(self) -> BottleneckConfig | None:
        """None where the method has none. ValueError where the manifest's options are not bottlenecks'."""
        if self.method not in BOTTLENECK_METHODS:
            return None
        options = self.manifest.get("bottleneck")
        size, activation = (options.get(key) if isinstance(options, dict) else None for key in ("size", "activation"))
        if not (isinstance(size, int) and isinstance(activation, str)):
            raise ValueError(f"{self.directory / MANIFEST}: bottleneck is {options!r}, not a size and an activation")
        return BottleneckConfig(size=size, activation=activation)

    @property
    def prefix(self) -> PrefixConfig | None:
        """The positions that the method adds; None where it adds none. ValueError where they are no two numbers."""
        if self.method not in PREFIX_METHODS:
            return None
        options = self.manifest.get("prefix")
        counts = [options.get(key) if isinstance(options, dict) else None for key in ("num_prefix", "num_infix")]
        num_prefix, num_infix = counts
        if not (isinstance(num_prefix, int) and isinstance(num_infix, int)):
            raise ValueError(f"{self.directory / MANIFEST}: prefix is {options!r}, not a num_prefix and a num_infix")
        return PrefixConfig(num_prefix=num_prefix, num_infix=num_infix)

    @property
    def specs(self) -> list[AdapterSpec]:
        """LoRA's factors beside what else trains."""
        is_lora = self.method in LORA_PREFIX_METHODS
        return parse_specs(self.directory, self.manifest, self.model) if is_lora else []

    def compute_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the file's tensors. ValueError for a method that this version does not know."""
        if (prefix := self.prefix) is not None:
            vectors = build_prefix_specs(self.method, prefix, self.model)
            shapes: dict[str, tuple[int, ...]] = {spec.name: spec.shape for spec in vectors}
            return shapes | compute_factor_shapes(self.specs, self.model)
        if (bottleneck := self.bottleneck) is not None:
            specs = build_bottleneck_specs(self.method, bottleneck, self.model)
            return {f"{spec.name}.{key}": shape for spec in specs for key, shape in spec.shapes.items()}
        require_one_of("method", self.method, ("bitfit", *BOTTLENECK_METHODS, *PREFIX_METHODS))
        return compute_base_shapes([], self.model, "all", ())

    @property
    def needs_merge(self) -> bool:
        """True for BitFit: its biases are the whole batch's."""
        return self.method == "bitfit"

    def read(self) -> dict[str, torch.Tensor]:
        """Whole fp32 tensors by canonical name. ValueError where a value is not finite."""
        path = self.directory / PEFT_WEIGHTS
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds values that are not finite; name another adapter")
        return from_peft_base(tensors, [], self.model, "all", ()) if self.method == "bitfit" else tensors


def read_method_name(directory: Path) -> str | None:
    """The method of a directory of this store; None for LoRA's, and where nothing says so."""
    path = directory / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    return str(manifest["method"]) if manifest.get("kind") == METHOD_KIND else None


def open_method(directory: Path, *, model: ModelConfig, base_fingerprint: str) -> StoredMethod:
    """ValueError, naming key and both values, for a damaged file, another base, or tensors that do not fit."""
    manifest = read_manifest(directory)
    check_same({"base_fingerprint": base_fingerprint}, manifest, directory)
    stored = StoredMethod(directory=directory, manifest=manifest, model=model)
    if PEFT_WEIGHTS not in manifest["sha256"]:
        raise ValueError(f"{directory / MANIFEST} does not list {PEFT_WEIGHTS}")
    check_tensors(directory / PEFT_WEIGHTS, stored.compute_shapes())
    return stored


@torch.no_grad()
def load_method(
    stored: StoredMethod, *, options: Mapping[str, Any], trainable: Sequence[TrainableParameter], topology: Topology
) -> None:
    """Fill this process's trained parameters, before an optimizer is built over them. ValueError for other options."""
    check_same(options, stored.manifest, stored.directory)
    values = stored.read()
    for one in trainable:
        assert tuple(values[one.name].shape) == one.full_shape
        one.parameter.copy_(cut_shard(values[one.name], one, topology))
