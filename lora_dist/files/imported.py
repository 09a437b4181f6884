"""Factors and biases by another tool's names, checked against the model and made into canonical adapters; pure.

Shapes: A [R, H], B [O, R].
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.base_values import compute_stored_shapes, from_stored
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_wrappers import find_text_name
from lora_dist.files.modules import FAMILY_NAMES, ModuleName, find_stored_rows, parse_module_name
from lora_dist.lora.spec import CANONICAL_TARGETS, AdapterSpec
from lora_dist.lora.targets import compute_linear_shapes, find_num_experts
from lora_dist.lora.trained_base import list_trained_base


@dataclass(kw_only=True, slots=True)
class ImportedAdapter:
    """What another tool's files hold."""

    specs: list[AdapterSpec]
    bias: str
    values: dict[str, torch.Tensor]
    """Whole tensors by canonical name, in the file's dtype."""
    modules: list[str] = field(default_factory=list)
    """Modules of the base (lora.modules_to_save) that `values` holds too."""
    names: dict[str, str] = field(default_factory=dict)
    """Target -> name template of its linear in the source."""

    @property
    def dtype(self) -> torch.dtype:
        """The one that holds every value."""
        dtype = next(iter(self.values.values())).dtype
        for value in self.values.values():
            dtype = torch.promote_types(dtype, value.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """A pair as the source stores it."""

    module: ModuleName
    key: str
    """Of the source, for messages."""
    a_RH: torch.Tensor
    b_OR: torch.Tensor
    alpha: float
    magnitude_O: torch.Tensor | None = None
    """DoRA's lengths of the output rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Projection:
    """One projection's part of a stored pair."""

    target: str
    a_RH: torch.Tensor
    b_OR: torch.Tensor
    shares_a: bool = False
    magnitude_O: torch.Tensor | None = None


def drop_keys(tensors: Mapping[str, torch.Tensor], patterns: Sequence[str]) -> dict[str, torch.Tensor]:
    """Without those that a regular expression matches whole. ValueError for one that matches none."""
    dropped: set[str] = set()
    for pattern in patterns:
        try:
            matched = {key for key in tensors if re.fullmatch(pattern, key)}
        except re.error as error:
            raise ValueError(f"drop: {pattern!r} is no regular expression ({error}); any text is .*") from None
        if not matched:
            raise ValueError(f"drop: {pattern!r} matches no key of the source")
        dropped |= matched
    return {key: value for key, value in tensors.items() if key not in dropped}


def build_imported(
    path: Path,
    factors: Sequence[Factors],
    biases: Mapping[str, torch.Tensor],
    model: ModelConfig,
    *,
    rank_stabilized: bool,
    bias: str,
    of_experts: Sequence[tuple[AdapterSpec, dict[str, torch.Tensor]]] = (),
) -> ImportedAdapter:
    """`biases` by the name of their module; `of_experts` are canonical already. ValueError for what does not fit the
    model.
    """
    if not factors and not of_experts:
        raise ValueError(f"{path} holds no LoRA factors")
    specs, values = _build_adapters(path, factors, model, rank_stabilized=rank_stabilized)
    for spec, own in of_experts:
        specs, values = [*specs, spec], values | own
    specs.sort(key=lambda spec: (spec.layer, CANONICAL_TARGETS.index(spec.target)))
    _check_lengths(path, specs, model)
    trained = _read_biases(path, biases, specs, model, bias)
    names = {target: one.module.template for one in factors for target in one.module.targets}
    return ImportedAdapter(specs=specs, bias=bias if trained else "none", values=values | trained, names=names)


def _check_lengths(path: Path, specs: Sequence[AdapterSpec], model: ModelConfig) -> None:
    """ValueError where DoRA's lengths of a fused linear are there for some of its targets alone."""
    named = {spec.name for spec in specs if spec.use_dora}
    for layer, fused in itertools.product(range(model.num_layers), model.architecture.fused_targets):
        names = [f"layers.{layer}.{target}" for target in fused]
        missing = [name for name in names if name not in named]
        if named & set(names) and missing:
            raise ValueError(
                f"{path}: {missing[0]} has no lora_magnitude_vector, but the linear of {', '.join(fused)} in"
                f" {model.family} has one for all of them; import the adapter as PEFT wrote it for that linear"
            )


def build_factors(path: Path, name: str, key: str, a_RH: torch.Tensor, b_OR: torch.Tensor, alpha: float) -> Factors:
    """ValueError where `name` is no linear known here."""
    module = parse_module_name(name)
    if module is None:
        raise ValueError(f"{path}: {key} is no linear of a layer that is known here; leave it out with drop=[...]")
    return Factors(module=module, key=key, a_RH=a_RH, b_OR=b_OR, alpha=alpha)


def _build_adapters(
    path: Path, factors: Sequence[Factors], model: ModelConfig, *, rank_stabilized: bool
) -> tuple[list[AdapterSpec], dict[str, torch.Tensor]]:
    """Canonical adapters by layer and target. ValueError for shapes or layers that the model has not."""
    found = []
    for one in factors:
        layer = min(one.module.layer, model.num_layers - 1)  # one that is not there is named below
        shapes = compute_linear_shapes(model, layer)
        if not _is_linear(one.module.targets[0], model, layer) or not _fuses_as(one.module, model):
            raise ValueError(f"{path}: {one.key}: {model.name} is {model.family}, which has no such linear")
        in_features = shapes[one.module.targets[0]][0]
        out_features = sum(shapes[target][1] for target in one.module.targets)
        expected = (one.a_RH.shape[0], in_features), (out_features, one.a_RH.shape[0])
        actual = tuple(one.a_RH.shape), tuple(one.b_OR.shape)
        if actual != expected or one.module.layer >= model.num_layers:
            raise ValueError(
                f"{path}: {one.key}: A and B are {actual}; {model.name} needs {expected}"
                f" in layers 0 to {model.num_layers - 1}"
            )
        if one.magnitude_O is not None and tuple(one.magnitude_O.shape) != expected[1][:1]:
            found_shape = tuple(one.magnitude_O.shape)
            raise ValueError(f"{path}: {one.key}: its magnitudes are {found_shape}; the model needs {expected[1][:1]}")
        for split in _split(one, model):
            spec = AdapterSpec(
                layer=one.module.layer,
                target=split.target,
                lora_rank=split.a_RH.shape[0],
                alpha=scale_alpha(one.alpha, split.a_RH.shape[0] / one.a_RH.shape[0], rank_stabilized),
                in_features=in_features,
                out_features=shapes[split.target][1],
                rank_stabilized=rank_stabilized,
                shares_a=split.shares_a,
                use_dora=split.magnitude_O is not None,
            )
            found.append((spec, split))
    return _collect(path, found)


def _is_linear(target: str, model: ModelConfig, layer: int) -> bool:
    """Whether transformers has a linear of the layer for it, which it has not for experts' ones."""
    is_there = target in FAMILY_NAMES[model.family] and target in compute_linear_shapes(model, layer)
    return is_there and find_num_experts(target, model, layer) is None


def _collect(
    path: Path, found: list[tuple[AdapterSpec, _Projection]]
) -> tuple[list[AdapterSpec], dict[str, torch.Tensor]]:
    found.sort(key=lambda one: (one[0].layer, CANONICAL_TARGETS.index(one[0].target)))
    values = {}
    for spec, part in found:
        if f"{spec.name}.lora_A" in values:
            raise ValueError(f"{path} holds two adapters of {spec.name}")
        values[f"{spec.name}.lora_A"], values[f"{spec.name}.lora_B"] = part.a_RH.contiguous(), part.b_OR.contiguous()
        if part.magnitude_O is not None:
            values[f"{spec.name}.magnitude"] = part.magnitude_O.contiguous()
    return [spec for spec, _ in found], values


def _fuses_as(module: ModuleName, model: ModelConfig) -> bool:
    """Whether the rows of a linear for several targets are the family's: True for any other linear."""
    own = FAMILY_NAMES[model.family][module.targets[0]]
    return len(module.targets) == 1 or module.template.rpartition(".")[2] == own.rpartition(".")[2]


def _split(one: Factors, model: ModelConfig) -> list[_Projection]:
    """The targets of a fused pair: each its own columns where B is made of blocks, else all of them with the same A.

    With DoRA always all of them, as each has lengths of its own whether B writes its rows or not.
    """
    if len(one.module.targets) == 1:
        return [_Projection(target=one.module.targets[0], a_RH=one.a_RH, b_OR=one.b_OR, magnitude_O=one.magnitude_O)]
    rows, lengths_O = find_stored_rows(one.module.targets[0], model, one.module.layer), one.magnitude_O
    blocks = {target: one.b_OR[own_rows] for target, own_rows in rows.items()}
    owners = find_block_owners(list(blocks.values()))
    if owners is None or lengths_O is not None:
        lengths = {target: None if lengths_O is None else lengths_O[own_rows] for target, own_rows in rows.items()}
        return [
            _Projection(target=target, a_RH=one.a_RH, b_OR=block, shares_a=True, magnitude_O=lengths[target])
            for target, block in blocks.items()
        ]
    projections = []
    for index, (target, block) in enumerate(blocks.items()):
        columns = owners == index
        if columns.any():
            projections.append(_Projection(target=target, a_RH=one.a_RH[columns], b_OR=block[:, columns]))
    return projections


def find_block_owners(blocks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Block that each column of the fused B writes, if every column writes one and the blocks' columns are in order."""
    writes = torch.stack([(block != 0).any(0) for block in blocks])
    owners = writes.int().argmax(0)
    is_blocked = bool((writes.sum(0) == 1).all()) and bool((owners.diff() >= 0).all())
    return owners if is_blocked else None


def scale_alpha(alpha: float, ratio: float, rank_stabilized: bool) -> float:
    """The alpha that keeps the scaling at `ratio` times the rank."""
    scaled = alpha * (math.sqrt(ratio) if rank_stabilized else ratio)
    return int(scaled) if scaled == int(scaled) else scaled


def _read_biases(
    path: Path, biases: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig, bias: str
) -> dict[str, torch.Tensor]:
    """Canonical values; exactly those that `bias` trains."""
    names = list_trained_base(specs, model, bias)
    expected = compute_stored_shapes(names, model)
    prefix, found = HF_FAMILIES[model.family].prefix, dict[str, torch.Tensor]()
    for name, tensor in biases.items():
        text_name = find_text_name(f"{name}.bias", model.wrapper)
        found[(text_name or name).removeprefix(prefix)] = tensor
    for name in sorted(expected.keys() | found.keys()):
        actual = tuple(found[name].shape) if name in found else "none"
        wanted = expected.get(name, "none")
        if actual != wanted:
            raise ValueError(f"{path}: {name} has shape {actual}, bias={bias} on {model.name} needs {wanted}")
    return from_stored(found, names, model)
