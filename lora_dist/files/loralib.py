"""State dicts of loralib, the paper's own package: `lora.Linear` and `lora.MergedLinear`; both ways.

A MergedLinear that adapts n of q, k, v stores their A one below the other [n R, H] and their B likewise [n O, R].

Shapes: A [R, H], B [O, R].
"""

import pickle  # for the name of its error: nothing is unpickled here
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_dist.config import ModelConfig
from lora_dist.files.base_values import to_stored
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_gpt2 import QKV_TARGETS
from lora_dist.files.imported import Factors, ImportedAdapter, build_factors, build_imported, drop_keys
from lora_dist.files.loralib_settings import LoralibSettings, read_settings
from lora_dist.files.modules import is_fused, list_linear_names, parse_module_name
from lora_dist.files.safetensors_stream import read_header
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.trained_base import list_trained_base

_WRAPPERS = ("model_state_dict", "state_dict", "model")
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|bias)")


def import_loralib(
    path: Path,
    model: ModelConfig,
    *,
    alpha: float | None,
    fused_targets: Sequence[str] | None,
    drop: Sequence[str] = (),
) -> ImportedAdapter:
    """ValueError, naming the key, for what is no LoRA state dict or does not fit.

    A lora_settings.json beside `path` says every module's alpha, and which of q, k, v a MergedLinear adapts (its
    enable_lora); without it `alpha` does, and `fused_targets` where these are not all three.
    """
    _check_layout(model)
    settings = read_settings(path, alpha, fused_targets)
    tensors = drop_keys(read_state_dict(path), drop)
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{path}: {key} is neither a LoRA factor nor a bias; leave it out with drop=[...]")
        parts[found[1]][found[2]] = tensor
    factors = [
        one
        for name, pair in parts.items()
        if "lora_A" in pair or "lora_B" in pair
        for one in _read_pair(path, name, pair, model, settings)
    ]
    biases = {name: pair["bias"] for name, pair in parts.items() if "bias" in pair}
    adapted = {name for name, pair in parts.items() if "lora_A" in pair}
    bias = "none" if not biases else "lora_only" if biases.keys() <= adapted else "all"
    return build_imported(path, factors, biases, model, rank_stabilized=False, bias=bias)


def _check_layout(model: ModelConfig) -> None:
    if model.architecture.fused_targets and model.family != "gpt2":
        raise ValueError(
            f"format=loralib: its MergedLinear has q, k and v of one size, one after the other, which {model.family}'s"
            " fused linear has not; use format=peft"
        )


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name; torch's files are read by its weights-only loader, which runs no code of theirs."""
    if not path.is_file():
        raise ValueError(f"source={path} is no file")
    if path.suffix == ".safetensors":
        read_header(path)
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"source={path} is no file of tensors alone: {str(error).splitlines()[0]}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"source={path} is no state dict")
    return dict(content)


def _read_pair(
    path: Path, name: str, pair: Mapping[str, torch.Tensor], model: ModelConfig, settings: LoralibSettings
) -> list[Factors]:
    """One pair a projection of a MergedLinear, or the pair of a Linear."""
    for kind in ("lora_A", "lora_B"):
        if kind not in pair or pair[kind].ndim != 2:
            raise ValueError(f"{path}: {name}.{kind} is missing or no matrix")
    a_RH, b_OR, key = pair["lora_A"], pair["lora_B"], f"{name}.lora_A"
    num_parts, alpha = b_OR.shape[0] // model.hidden_size, settings.find_alpha(name, b_OR.shape[1])
    is_linear = a_RH.shape[0] == b_OR.shape[1] and num_parts == 3
    if not is_fused(name) or is_linear:
        return [build_factors(path, name, key, a_RH, b_OR, alpha)]
    targets = settings.find_targets(name, num_parts)
    pairs = zip(targets, a_RH.chunk(num_parts), b_OR.chunk(num_parts), strict=True)
    return [_build_part(path, name, key, target, a, b, alpha) for target, a, b in pairs]


def _build_part(
    path: Path, name: str, key: str, target: str, a_RH: torch.Tensor, b_OR: torch.Tensor, alpha: float
) -> Factors:
    module = parse_module_name(name)
    if module is None:
        raise ValueError(f"{path}: {key} is no linear of a layer that is known here; leave it out with drop=[...]")
    one = type(module)(layer=module.layer, targets=(target,), template=module.template)
    return Factors(module=one, key=key, a_RH=a_RH, b_OR=b_OR, alpha=alpha)


def export_loralib(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    names: Mapping[str, str],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict, and what the modules have to be built with: r, lora_alpha and enable_lora by name.

    ValueError where q, k and v of one fused linear differ in rank or alpha, which a MergedLinear cannot.
    """
    _check_layout(model)
    modules: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        modules[{**list_linear_names(model), **names}[spec.target].format(layer=spec.layer)].append(spec)
    state: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for name, group in modules.items():
        first = group[0]
        _check_alike(name, group)
        state[f"{name}.lora_A"] = _stack(values, group[:1] if first.shares_a else group, "lora_A")
        state[f"{name}.lora_B"] = _stack(values, group, "lora_B")
        # loralib knows alpha / r alone
        alpha = first.scaling * first.lora_rank if first.rank_stabilized else first.alpha
        settings[name] = {"r": first.lora_rank, "lora_alpha": alpha}
        if is_fused(name) and not first.shares_a:
            settings[name]["enable_lora"] = [target in {spec.target for spec in group} for target in QKV_TARGETS]
    biases, prefix = to_stored(values, list_trained_base(specs, model, bias), model), HF_FAMILIES[model.family].prefix
    return state | {f"{prefix}{name}": tensor for name, tensor in biases.items()}, settings


def _stack(values: Mapping[str, torch.Tensor], group: Sequence[AdapterSpec], kind: str) -> torch.Tensor:
    return torch.cat([values[f"{spec.name}.{kind}"] for spec in group])


def _check_alike(name: str, group: Sequence[AdapterSpec]) -> None:
    for spec in group[1:]:
        if (spec.lora_rank, spec.alpha) != (group[0].lora_rank, group[0].alpha):
            raise ValueError(
                f"format=loralib: {name} has one rank and alpha, but {group[0].name} has"
                f" {group[0].lora_rank} and {group[0].alpha}, {spec.name} {spec.lora_rank} and {spec.alpha}"
            )
