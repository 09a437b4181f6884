"""Which parameters of the base train beside the adapters: biases (lora.bias) and whole modules; pure."""

from collections import defaultdict
from collections.abc import Sequence

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.config import ModelConfig
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import find_linear
from lora_dist.saved_modules import is_saved

_QKV = ("q_proj", "k_proj", "v_proj")


def list_trained_base(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str] = ()
) -> list[str]:
    """Canonical names, of the whole model. `bias` none, lora_only (biases of adapted linears) or all.

    ValueError where lora_only would train q's bias but not k's, and each is a tensor of its own in the files.
    """
    whole = [name for name in compute_canonical_shapes(model) if is_saved(name, modules, model)]
    return [*_choose_biases(specs, model, bias), *whole]


def check_biases(specs: Sequence[AdapterSpec], model: ModelConfig, bias: str) -> None:
    """ValueError where `bias` is to train some and there are none, or as `list_trained_base`."""
    if bias != "none" and not list_trained_base(specs, model, bias):
        raise ValueError(f"lora.bias={bias}: no linear that is adapted has a bias in {model.name}; set lora.bias=none")


def list_biases(model: ModelConfig) -> list[str]:
    """Canonical names of all of them, the norms' too."""
    return [name for name in compute_canonical_shapes(model) if name.endswith(".bias")]


def _choose_biases(specs: Sequence[AdapterSpec], model: ModelConfig, bias: str) -> list[str]:
    if bias != "lora_only":
        return list_biases(model) if bias == "all" else []
    targets: dict[str, set[str]] = defaultdict(set)
    for spec in specs:
        targets[f"decoder.layers.{spec.layer}.{find_linear(spec.target, model)}.bias"].add(spec.target)
    chosen = [name for name in list_biases(model) if name in targets]
    for name in chosen:
        missing = set(_QKV) - targets[name]
        if name.endswith("linear_qkv.bias") and missing and _QKV not in model.architecture.fused_targets:
            raise ValueError(
                f"bias=lora_only: the biases of q, k and v train together here, but {name} has no adapter on"
                f" {', '.join(sorted(missing))}; adapt all three or use bias=all"
            )
    return chosen
