"""Where each canonical parameter lies in a Hugging Face checkpoint, whatever the family; pure.

Megatron fuses q, k and v, and the gate and up of a gated MLP; Hugging Face stores them side by side in one tensor
(GPT-2, Phi-3) or as tensors of their own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_dist.architecture import IN_OUT
from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.files.hf_wrappers import name_in_memory
from lora_dist.lora.layer import compute_fused_rows
from lora_dist.lora.targets import compute_linear_shapes
from lora_dist.model_config import ModelConfig

TIED_HEAD = "lm_head.weight"
_TARGETS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "self_attention.linear_q_proj": ("q_proj",),
    "self_attention.linear_q_down_proj": ("q_a_proj",),
    "self_attention.linear_q_up_proj": ("q_b_proj",),
    "self_attention.linear_kv_down_proj": ("kv_a_proj",),
    "self_attention.linear_kv_up_proj": ("kv_b_proj",),
    "self_attention.linear_out": ("out_proj",),
    "mlp.linear_fc1": ("up_proj",),
    "mlp.linear_fc2": ("down_proj",),
    "mlp.shared_experts.linear_fc2": ("shared_down_proj",),
}
"""Of a module that is stored as one linear."""
STACKS = {"linear_fc1.weight": "mlp.experts.gate_up_proj", "linear_fc2.weight": "mlp.experts.down_proj"}
"""Tensor of an expert's linear -> what transformers 5 calls that of all experts of a layer, gate's rows before up's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfPart:
    """A canonical parameter, or one target's rows of it, as Hugging Face stores them."""

    name: str
    """Without the family's prefix."""
    target: str | None = None
    """Whose rows of a fused parameter; None where the parameter is stored as one."""
    first: int = 0
    """Output feature of the stored tensor where they begin."""
    transposed: bool = False
    interleaved: bool = False
    """Gate and up alternate in the stored tensor, where the parameter has all of gate before all of up."""
    expert: int | None = None
    """Whose entry it is of a stored tensor that holds all experts'."""
    layer: int = 0
    """That the target is of."""
    has_unit_dim: bool = False
    """The stored tensor's second dimension is one, which the parameter has not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFamily:
    """How Hugging Face writes the models of one family."""

    architecture: str
    """transformers' class, which config.json names."""
    prefix: str = ""
    """In front of every stored name; checkpoints without it are read too."""
    settings: Mapping[str, tuple[object, tuple[object, ...]]]
    """Key of config.json: what it means where it is absent, and the values this project computes."""
    read_fields: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    """ModelConfig's fields out of config.json. ValueError for what this project does not compute."""
    describe: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that ModelConfig decides; the inverse of `read_fields`."""
    find_parts: Callable[[str, ModelConfig], Sequence[HfPart]]
    """By canonical name."""
    compute_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    """Every tensor that a checkpoint must hold, in the order it is written."""
    ignored: re.Pattern[str] | None = None
    """Buffers of old checkpoints, which every implementation makes for itself."""
    embedding: str = "model.embed_tokens.weight"
    """The tensor that a stored output layer must equal where it is tied."""
    in_mxfp4: bool = False
    """Its experts' weights may be stored so."""
    has_stacks: bool = False
    """Its files always have a layer's experts in one tensor, in a way of their own."""
    compute_carried: Callable[[ModelConfig], dict[str, tuple[int, ...]]] = lambda model: {}
    """Further tensors that a checkpoint must hold, with which nothing is computed here, and what is written too."""
    wider: re.Pattern[str] | None = None
    """Tensors that may be in fp32 whatever the others are in."""
    extra_layers: re.Pattern[str] | None = None
    """Tensors, with their layer's number, of which a checkpoint may have more after the model's last layer, to predict
    several tokens at once. As by transformers they are left out."""
    without_extra: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says where there are none of these."""
    module_names: Mapping[str, str] = field(default_factory=dict)
    """What transformers 5 calls modules in memory that have another name in the files."""

    def is_ignored(self, stored_name: str, num_layers: int) -> bool:
        """Whether a checkpoint may hold a tensor that is not the model's."""
        if self.ignored is not None and self.ignored.fullmatch(stored_name):
            return True
        extra = self.extra_layers and self.extra_layers.fullmatch(stored_name)
        return bool(extra and int(extra[1]) >= num_layers)

    def find_module(self, stored_name: str, wrapper: str | None = None) -> str:
        """Full name, in transformers' model, of the module that has a stored tensor."""
        module = f"{self.prefix}{stored_name}".rpartition(".")[0]
        return name_in_memory(self.module_names.get(module, module), wrapper)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNames:
    """Stored names of a family whose linears are [out, in]."""

    layers: str
    """Prefix of a layer's modules, with {layer}."""
    modules: Mapping[str, str | Mapping[str, str]]
    """Canonical module of a layer -> the stored one with the same rows, or one for each target that it fuses; targets
    with the same one lie in it one after the other. {expert} stands for the number of an expert."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Canonical tensor of a layer that is neither a weight nor a bias -> the stored one."""
    stacks: Mapping[str, str] = field(default_factory=dict)
    """Where a layer's experts are always stored together: tensor of an expert's linear -> the stored one of all, whose
    weights are [in, out] and which has gate and up by turns. Elsewhere model.stacked_experts says whether they are."""
    beside_stacks: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a layer's stored names -> what it is in files with stacked experts, which have transformers' names
    in memory."""
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Canonical tensor of a convolution's weights -> the stored one of each part that is convolved, one after the other
    where it is the same; as torch has them, with a dimension of one."""
    others: Mapping[str, str]
    """Canonical parameters outside the layers -> stored names; the output layer's where it is not tied."""

    def find_parts(self, canonical_name: str, model: ModelConfig) -> list[HfPart]:
        """`decoder.layers.3.mlp.linear_fc1.weight` -> gate_proj's weight and up_proj's."""
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(\w+)", canonical_name)
        if found is None:
            is_tied_copy = model.tied_output and canonical_name == "output_layer.weight"
            return [HfPart(name=self.others["embedding.word_embeddings.weight" if is_tied_copy else canonical_name])]
        layer, module, kind = found.groups()
        if f"{module}.{kind}" in self.tensors:
            stored_name = self._rename(self.tensors[f"{module}.{kind}"], model)
            return [HfPart(name=self.layers.format(layer=layer) + stored_name)]
        if f"{module}.{kind}" in self.kernels:
            prefix = self.layers.format(layer=layer)
            stored_parts = {part: prefix + name for part, name in self.kernels[f"{module}.{kind}"].items()}
            parts = _list_targets(stored_parts, _count_rows(model, int(layer)), int(layer))
            return [replace(part, has_unit_dim=True) for part in parts]
        expert = re.search(r"\.experts\.(\d+)\.", module)
        if expert is not None and (self.stacks or model.stacked_experts is not None):
            return [self._find_in_stack(int(layer), int(expert[1]), f"{module[expert.end() :]}.{kind}", model)]
        if expert is not None:
            module = module.replace(expert[0], ".experts.{expert}.")

        def name_tensor(linear: str) -> str:
            name = f"{self.layers}{self._rename(linear, model)}.{kind}"
            return name.format(layer=layer, expert=expert and expert[1])

        stored = self.modules[module]
        if isinstance(stored, str):
            return [HfPart(name=name_tensor(stored))]
        sizes = _count_rows(model, int(layer))
        return _list_targets({target: name_tensor(name) for target, name in stored.items()}, sizes, int(layer))

    def _find_in_stack(self, layer: int, expert: int, tensor: str, model: ModelConfig) -> HfPart:
        name = self.layers.format(layer=layer) + (self.stacks or STACKS)[tensor]
        is_weight, is_first = tensor.endswith(".weight"), tensor.startswith("linear_fc1.")
        is_transposed = is_weight if self.stacks else model.stacked_experts == IN_OUT
        return HfPart(
            name=name, transposed=is_transposed, interleaved=is_first and bool(self.stacks), expert=expert, layer=layer
        )

    def _rename(self, stored: str, model: ModelConfig) -> str:
        beginnings = self.beside_stacks if model.stacked_experts is not None else {}
        old = next((old for old in beginnings if stored.startswith(old)), "")
        return beginnings.get(old, "") + stored.removeprefix(old)

    def compute_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every stored tensor."""
        shapes, sizes = {}, [_count_rows(model, layer) for layer in range(model.num_layers)]
        for canonical_name, shape in compute_canonical_shapes(model).items():
            for part in self.find_parts(canonical_name, model):  # the last part of a tensor ends where it does
                own_rows = shape[:1] if part.target is None else (part.first + sizes[part.layer][part.target],)
                own_shape = own_rows + (1,) * part.has_unit_dim + shape[1:]
                if part.expert is not None:
                    own_shape = (model.num_experts or 0, *(own_shape[::-1] if part.transposed else own_shape))
                shapes[part.name] = own_shape
        return shapes

    def list_target_names(self) -> dict[str, str]:
        """Target -> template of its linear's name, with {layer}; experts' linears are no targets."""
        names: dict[str, str] = {}
        for module, stored in self.modules.items():
            if ".experts." in module:
                continue
            if not isinstance(stored, str):
                names |= stored
            else:
                names |= dict.fromkeys(_TARGETS.get(module, ()), stored)
        return {target: self.layers + name for target, name in names.items()}


def _count_rows(model: ModelConfig, layer: int) -> dict[str, int]:
    """Of each target of a layer, and of what a gated DeltaNet convolves."""
    rows = {target: num_rows for target, (_, num_rows) in compute_linear_shapes(model, layer).items()}
    if model.has_delta_net(layer):
        sizes = model.delta_sizes
        rows |= {part: sizes.key_heads * size for part, size in sizes.convolved_parts.items()}
    return rows


def _list_targets(stored: Mapping[str, str], sizes: Mapping[str, int], layer: int) -> list[HfPart]:
    """Each target's rows of its stored tensor."""
    parts, filled = [], dict.fromkeys(stored.values(), 0)
    for target, name in stored.items():
        parts.append(HfPart(name=name, target=target, first=filled[name], layer=layer))
        filled[name] += sizes[target]
    return parts


def split_to_hf(whole: torch.Tensor, parts: Sequence[HfPart], model: ModelConfig) -> dict[str, torch.Tensor]:
    """A whole canonical tensor as Hugging Face stores it, by stored name; of experts that are stored together the one
    entry that it is.
    """
    blocks: dict[str, list[torch.Tensor]] = {}
    for part in sorted(parts, key=lambda part: part.first):
        rows = None if part.target is None else compute_fused_rows(part.target, model, part.layer)
        block = whole if rows is None or part.target is None else whole[rows[part.target]]
        blocks.setdefault(part.name, []).append(block)
    joined = {name: block[0] if len(block) == 1 else torch.cat(block) for name, block in blocks.items()}
    return {part.name: _lay_out(joined[part.name], part) for part in parts}


def _lay_out(tensor: torch.Tensor, part: HfPart) -> torch.Tensor:
    if part.interleaved:
        tensor = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)
    tensor = tensor.t() if part.transposed else tensor
    tensor = tensor[:, None] if part.has_unit_dim else tensor
    return tensor if part.expert is None else tensor[None]


def join_from_hf(
    stored: Mapping[str, torch.Tensor], canonical_shape: tuple[int, ...], parts: Sequence[HfPart], model: ModelConfig
) -> torch.Tensor:
    """The inverse of `split_to_hf`."""
    whole = stored[parts[0].name].new_empty(canonical_shape)
    for part in parts:
        tensor = stored[part.name].t() if part.transposed else stored[part.name]
        rows = None if part.target is None else compute_fused_rows(part.target, model, part.layer)
        if rows is None or part.target is None:
            return tensor
        own_rows = rows[part.target]
        whole[own_rows] = tensor[part.first : part.first + len(own_rows)]
    return whole


def get_number(config: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    """A number of config.json, `default` where that has none or null; ValueError where it is something else."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {key}={value!r} is not a number")
    return value


def get_size(config: Mapping[str, Any], key: str, path: Path) -> int:
    """A positive integer of config.json; ValueError where it is none."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key}={value!r} is not a positive integer")
    return value
