"""PEFT's modules_to_save: its names for them, and their tensors taken out of its files."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.config import ModelConfig
from lora_dist.files.base_values import compute_stored_shapes, from_stored
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_layout import TIED_HEAD
from lora_dist.files.hf_wrappers import list_older_names
from lora_dist.files.peft_base import KEY_PREFIX, find_base_keys
from lora_dist.lora.trained_base import list_trained_base
from lora_dist.saved_modules import find_embedding_name, find_norms, is_saved, list_saved_modules

_HEAD = TIED_HEAD.removesuffix(".weight")


def name_peft_modules(modules: Sequence[str], model: ModelConfig) -> list[str]:
    """PEFT trains every module whose full name ends so, with `norm` Llama's other norms too; hence `model.norm`.

    Inside a wrapper all are named in full. A tied output layer is named beside its embedding, since PEFT trains the
    two apart.
    """
    stored, named = _find_stored_modules(model), []
    for module in modules:
        if model.wrapper is not None:  # what sees pictures has norms of such names too
            named += stored[module]
            continue
        others = [name for kind, names in stored.items() if kind != module for name in names]
        named.append(stored[module][0] if any(name.endswith(module) for name in others) else module)
    return [*named, _HEAD] if model.tied_output and find_embedding_name(model) in modules else named


def read_peft_modules(path: Path, modules: Sequence[str], bias: str, model: ModelConfig) -> list[str]:
    """lora.modules_to_save for PEFT's `modules`. ValueError for one that this project does not train whole.

    Where the output layer is the embedding, PEFT keeps a copy of each, so both have to be named.
    """
    stored = _find_stored_modules(model)
    matched: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        for kind, names in _match(path, module, stored, model).items():
            matched[kind] += names
    chosen = list(matched)
    _check_whole(path, modules, matched, stored)
    embedding = find_embedding_name(model)
    if model.tied_output and (_HEAD in modules) != (embedding in chosen):
        raise ValueError(
            f"{path}: modules_to_save={list(modules)} unties the output layer from the embedding, which are one here;"
            " both or none can be imported"
        )
    if bias == "all" and find_norms(chosen, model):
        raise ValueError(f"{path}: bias=all and modules_to_save={list(modules)} both hold the norms' biases")
    return chosen


def _match(path: Path, module: str, stored: dict[str, list[str]], model: ModelConfig) -> dict[str, list[str]]:
    """Full names that end with PEFT's `module`, by kind."""
    if model.tied_output and _HEAD.endswith(module):
        return {}
    module = HF_FAMILIES[model.family].module_names.get(module, module)
    matched = {kind: [name for name in names if name.endswith(module)] for kind, names in stored.items()}
    if not any(matched.values()):
        known = ", ".join(dict.fromkeys((*stored, _HEAD)))
        raise ValueError(f"{path}: modules_to_save names {module}; only {known} can be imported")
    return {kind: names for kind, names in matched.items() if names}


def _check_whole(
    path: Path, modules: Sequence[str], matched: dict[str, list[str]], stored: dict[str, list[str]]
) -> None:
    """All of a kind, or none."""
    for kind, names in matched.items():
        missing = next((name for name in stored[kind] if name not in names), None)
        if missing is not None:
            listed = ", ".join(module for module in modules if any(name.endswith(module) for name in names))
            raise ValueError(
                f"{path}: modules_to_save names {listed}, without {missing}; here all {kind} train or none"
            )


def _find_stored_modules(model: ModelConfig) -> dict[str, list[str]]:
    """Name of lora.modules_to_save -> full names in transformers."""
    found, family = defaultdict(list), HF_FAMILIES[model.family]
    find_module = partial(family.find_module, wrapper=model.wrapper)
    for kind in list_saved_modules(model):
        names = [name for name in compute_canonical_shapes(model) if is_saved(name, [kind], model)]
        found[kind] = list(dict.fromkeys(map(find_module, compute_stored_shapes(names, model))))
    return found


def take_modules(
    path: Path, tensors: dict[str, torch.Tensor], model: ModelConfig, modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Take the modules' tensors out of `tensors`; by canonical name. ValueError for one that is missing or does not
    fit, and for a tied output layer that is not the embedding.

    Before transformers 5 a module had the name in PEFT's files that it has in the checkpoint's; inside a wrapper, too.
    """
    family, stored = HF_FAMILIES[model.family], dict[str, torch.Tensor]()
    shapes = family.compute_shapes(model)
    for key, name in find_base_keys([], model, "none", modules).items():
        older = [f"{KEY_PREFIX}{old}" for old in (family.prefix + name, *list_older_names(name, model.wrapper))]
        found, wanted = tensors.pop(next((one for one in (key, *older) if one in tensors), key), None), shapes[name]
        if found is None or tuple(found.shape) != wanted:
            shape = "none" if found is None else tuple(found.shape)
            raise ValueError(f"{path}: {key} has shape {shape}, {model.name} needs {wanted}")
        if not torch.equal(stored.setdefault(name, found), found):
            raise ValueError(f"{path}: {key} is not the embedding, from which this model cannot untie it")
    return from_stored(stored, list_trained_base([], model, "none", modules), model)
