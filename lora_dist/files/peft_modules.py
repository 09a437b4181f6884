"""PEFT's modules_to_save, which its files hold beside the factors, taken out as canonical values."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_dist.config import MODULES_TO_SAVE, ModelConfig
from lora_dist.files.hf_gpt2 import compute_hf_shapes, find_hf_tensor
from lora_dist.files.peft_gpt2 import find_module_keys

_HEAD = "lm_head"


def check_modules(path: Path, modules: Sequence[str], bias: str) -> list[str]:
    """lora.modules_to_save for PEFT's `modules`. ValueError for one that this project does not train whole.

    Here the output layer is the embedding; PEFT keeps a copy of each, so both have to be named.
    """
    for module in modules:
        if module not in (*MODULES_TO_SAVE, _HEAD):
            known = ", ".join((*MODULES_TO_SAVE, _HEAD))
            raise ValueError(f"{path}: modules_to_save names {module}; only {known} can be imported")
    if (_HEAD in modules) != ("wte" in modules):
        raise ValueError(
            f"{path}: modules_to_save={list(modules)} unties the output layer from the embedding, which are one here;"
            " both or none can be imported"
        )
    if bias == "all" and any(module.startswith("ln_") for module in modules):
        raise ValueError(f"{path}: bias=all and modules_to_save={list(modules)} both hold the norms' biases")
    return [module for module in modules if module != _HEAD]


def take_modules(
    path: Path, tensors: dict[str, torch.Tensor], model: ModelConfig, modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Take the modules' tensors out of `tensors`; by canonical name. ValueError for one that is missing or does not
    fit, and for an output layer that is not the embedding.
    """
    shapes, values = compute_hf_shapes(model), dict[str, torch.Tensor]()
    for key, name in find_module_keys(model, modules).items():
        found, wanted = tensors.pop(key, None), shapes[find_hf_tensor(name).name]
        if found is None or tuple(found.shape) != wanted:
            shape = "none" if found is None else tuple(found.shape)
            raise ValueError(f"{path}: {key} has shape {shape}, {model.name} needs {wanted}")
        if not torch.equal(values.setdefault(name, found), found):
            raise ValueError(f"{path}: {key} is not the embedding, from which this model cannot untie it")
    return values
