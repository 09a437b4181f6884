"""Adapters that HF PEFT wrote, one on the fused c_attn or one a projection, read into canonical factors."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.config import ModelConfig
from lora_dist.files.directories import read_json
from lora_dist.files.hf_wrappers import find_text_name
from lora_dist.files.imported import Factors, ImportedAdapter, build_factors, build_imported, drop_keys
from lora_dist.files.modules import list_linear_names
from lora_dist.files.peft_base import KEY_PREFIX
from lora_dist.files.peft_experts import TARGETS, ExpertParameter, find_rows, list_parameters, split_targets
from lora_dist.files.peft_modules import read_peft_modules, take_modules
from lora_dist.files.safetensors_stream import read_header
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import compute_linear_shapes, compute_mlp_shapes, find_num_experts

_CONFIG, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_UNSUPPORTED = (
    *("lora_bias", "layer_replication", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config"),
)
"""Settings that change what the factors mean: refused unless empty or false."""
_ROUTER = ".gate.weight"
_CHANGES_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B)(?:\.default)?\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(.+)\.(lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_OUTSIDE_LAYERS = re.compile(
    r"lora_embedding_[AB]|\.(lm_head|embed_out|embed_tokens|embed_in|wte|wpe)\.lora_(A|B|magnitude_vector)"
)
_BIAS = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.bias")


def import_peft(directory: Path, model: ModelConfig, drop: Sequence[str] = ()) -> ImportedAdapter:
    """ValueError, naming file, key and both values, for what this model or this project has no place for."""
    config = read_json(directory / _CONFIG)
    _check_config(directory / _CONFIG, config)
    path = directory / _WEIGHTS
    if not path.exists() and (directory / _PICKLED).exists():
        raise ValueError(
            f"{directory} has {_PICKLED} alone, which could run code when it is read; load and save it with a PEFT that"
            f" writes {_WEIGHTS}"
        )
    read_header(path)
    tensors = drop_keys(load_file(path), drop)
    _check_places(path, tensors, model)
    modules = read_peft_modules(path, config.get("modules_to_save") or [], config.get("bias", "none"), model)
    values = take_modules(path, tensors, model, modules)
    rank_stabilized, bias = bool(config.get("use_rslora")), config.get("bias", "none")
    of_experts = _take_experts(path, tensors, config, model)
    factors, bias_tensors = _sort_keys(path, tensors, config)
    imported = build_imported(
        path, factors, bias_tensors, model, rank_stabilized=rank_stabilized, bias=bias, of_experts=of_experts
    )
    return replace(imported, values=imported.values | values, modules=modules)


def _check_places(path: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> None:
    beside = [key for key in tensors if find_text_name(key.removeprefix(KEY_PREFIX), model.wrapper) is None]
    if beside:
        part = re.escape(".".join(beside[0].split(".")[:4]))
        raise ValueError(
            f"{path}: {beside[0]} ({len(beside)} in all) is beside the text model of a {model.wrapper}, which alone is"
            f" trained here; train without it, or leave it out with drop=['{part}\\..*']"
        )
    outside = next((key for key in tensors if _OUTSIDE_LAYERS.search(key)), None)
    if outside is not None:
        raise ValueError(
            f"{path}: {outside} is a LoRA factor of the embedding or the output layer, which can only be trained whole"
            " here; leave those layers out of the adapter, or train them with lora.modules_to_save"
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be imported")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; train or convert the adapter without it")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} trained beside a changed base; save it with PEFT's"
            " path_initial_model_for_weight_conversion first"
        )
    _check_kinds(path, config)
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        raise ValueError(f"{path}: bias={config['bias']!r} is not one of none, lora_only, all")


def _check_kinds(path: Path, config: Mapping[str, Any]) -> None:
    for key in ("target_parameters", "modules_to_save"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: {key}={names!r} is no list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{path}: {key}={config[key]!r} is no JSON object")


def _take_experts(
    path: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any], model: ModelConfig
) -> list[tuple[AdapterSpec, dict[str, torch.Tensor]]]:
    """Take the adapters that target_parameters names out of `tensors`, for every layer that one matches."""
    settings, named, found, matched = path.with_name(_CONFIG), config.get("target_parameters") or [], [], set[str]()
    for layer in filter(model.has_experts, range(model.num_layers)):
        adapted = []
        for name in TARGETS:
            full_name = f".{ExpertParameter(layer, name, wrapper=model.wrapper).full_name}"
            hits = {one for one in named if full_name.endswith(f".{one}")}
            matched |= hits
            adapted += [name] if hits else []
        for parameter in list_parameters(layer, adapted, model):
            found += _take_parameter(path, tensors, parameter, config, model)
    for one in sorted(set(named) - matched):
        if f".{one}".endswith(_ROUTER) and model.num_experts is not None:
            _check_router(path, tensors)
        elif not any(f".{name}.weight".endswith(f".{one}") for name in _list_linears(model)):
            raise ValueError(f"{settings}: target_parameters: {model.name} has no {one} to adapt")
    return found


def _list_linears(model: ModelConfig) -> list[str]:
    """Full names in transformers of those that can be adapted, experts' ones left out."""
    return [
        list_linear_names(model)[target].format(layer=layer)
        for layer in range(model.num_layers)
        for target in compute_linear_shapes(model, layer)
        if find_num_experts(target, model, layer) is None
    ]


def _check_router(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """PEFT's all-linear takes the routers too. ValueError where their factors are still there."""
    key = next((key for key in tensors if ".mlp.gate.lora_" in key), None)
    if key is not None:
        raise ValueError(
            f"{path}: {key} adapts the router, which takes no adapter here; train without it, or leave its factors out"
            r" with drop=['.*\.mlp\.gate\..*']"
        )


def _take_parameter(
    path: Path,
    tensors: dict[str, torch.Tensor],
    parameter: ExpertParameter,
    config: Mapping[str, Any],
    model: ModelConfig,
) -> list[tuple[AdapterSpec, dict[str, torch.Tensor]]]:
    settings = path.with_name(_CONFIG)
    lora_rank = _find_setting(settings, config, parameter.full_name, "rank_pattern", "r")
    alpha = _find_setting(settings, config, parameter.full_name, "alpha_pattern", "lora_alpha")
    rows = find_rows(parameter, model)
    in_features = compute_mlp_shapes(model, parameter.layer)[TARGETS[parameter.name][0]][0]
    stacked_rank = int(lora_rank) * (model.num_experts or 1)
    expected = {"lora_A": (stacked_rank, in_features), "lora_B": (sum(map(len, rows.values())), stacked_rank)}
    pair: dict[str, torch.Tensor] = {}
    for factor, shape in expected.items():
        tensor = tensors.pop(parameter.key(factor), None)
        if tensor is None or tuple(tensor.shape) != shape:
            actual = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"{path}: {parameter.key(factor)} has shape {actual}; {parameter.full_name} of {model.name} needs"
                f" {shape} at rank {lora_rank}"
            )
        pair[factor] = tensor
    rank_stabilized = bool(config.get("use_rslora"))
    return split_targets(parameter, pair["lora_A"], pair["lora_B"], model, alpha=alpha, rank_stabilized=rank_stabilized)


def _sort_keys(
    path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[list[Factors], dict[str, torch.Tensor]]:
    """Pairs of factors, and biases by the module's name."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    biases: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if found := _FACTOR.fullmatch(key) or _MAGNITUDE.fullmatch(key):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif found := _BIAS.fullmatch(key):
            biases[found[1]] = tensor
        else:
            raise ValueError(f"{path}: {key} is neither a LoRA factor nor a bias; leave it out with drop=[...]")
    return [_pair(path, name, pair, config) for name, pair in pairs.items()], biases


def _pair(path: Path, name: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Factors:
    key = f"base_model.model.{name}"
    wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
    if missing := sorted(wanted - pair.keys()):
        suffix = "" if missing[0] == "lora_magnitude_vector" else ".weight"
        raise ValueError(f"{path}: {key}.{missing[0]}{suffix} is missing")
    if extra := sorted(pair.keys() - wanted):
        raise ValueError(f"{path}: {key}.{extra[0]} is there, but {_CONFIG} says use_dora={config.get('use_dora')}")
    named = config.get("target_parameters") or []
    full_name = f"{name}.weight" if any(f".{name}.weight".endswith(f".{one}") for one in named) else name
    lora_rank = _find_setting(path.with_name(_CONFIG), config, full_name, "rank_pattern", "r")
    if pair["lora_A"].shape[0] != lora_rank:
        found = tuple(pair["lora_A"].shape)
        raise ValueError(f"{path}: {key}.lora_A.weight has shape {found}, {_CONFIG} says rank {lora_rank}")
    alpha = _find_setting(path.with_name(_CONFIG), config, full_name, "alpha_pattern", "lora_alpha")
    factors = build_factors(path, name, f"{key}.lora_A.weight", pair["lora_A"], pair["lora_B"], alpha)
    return replace(factors, magnitude_O=pair.get("lora_magnitude_vector"))


def _find_setting(path: Path, config: Mapping[str, Any], name: str, pattern_key: str, key: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name. ValueError for what is no number."""
    found, value = key, config.get(key, 8)
    for pattern, own in (config.get(pattern_key) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"{path}: {pattern_key}: {pattern!r} is no regular expression ({error})") from None
        if matches:
            found, value = f"{pattern_key}.{pattern}", own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {found}={value!r} is not a number")
    return value
