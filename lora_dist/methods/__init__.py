"""What each method adds to the model and what it lets train. One more method is one more function in the table."""

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BOTTLENECK_METHODS
from lora_dist.config import METHODS, RunConfig
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.lora.trained_base import check_biases
from lora_dist.mcore.adapters import apply_lora, describe_untrained_lengths
from lora_dist.mcore.base_parameters import describe_base_parameters
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.pissa import split_base
from lora_dist.mcore.prefixes import put_prefixes
from lora_dist.methods.bitfit import apply_bitfit
from lora_dist.parameters import TrainableParameter
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedMethod:
    """What trains on this process, and the adapters of the whole model."""

    trainable: list[TrainableParameter]
    specs: list[AdapterSpec] = field(default_factory=list)
    """All layers' adapters, other pipeline stages' too; empty where the method has none."""
    constants: list[TrainableParameter] = field(default_factory=list)
    """What does not train but has to be known when the adapters are written: what PiSSA's began with, and the lengths
    of rows that DoRA leaves alone."""


def apply_method(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    """Make `gpt` train what `config.method` says. ValueError where a LoRA target matches nothing."""
    return _METHODS[config.method](gpt, config)


def _apply_lora(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    specs = build_adapter_specs(config.lora, config.model)
    check_biases(specs, config.model, config.lora.bias)
    trainable = apply_lora(
        gpt, specs, bias=config.lora.bias, seed=config.loop.seed, modules=config.lora.modules_to_save
    )
    constants = []
    if config.lora.init == "pissa":
        constants = split_base(gpt)
    elif config.model.architecture.fused_targets:  # they share one vector of lengths in PEFT's files
        constants = describe_untrained_lengths(gpt)
    return AppliedMethod(trainable=trainable, specs=specs, constants=constants)


def _apply_full(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    gpt.requires_grad_(True)
    return AppliedMethod(trainable=describe_base_parameters(gpt))


def _apply_bitfit(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    return AppliedMethod(trainable=apply_bitfit(gpt))


def _apply_bottlenecks(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    """AdapterH keeps the base's norms frozen, as the paper's comparison does: its counts have no term for them."""
    specs = build_bottleneck_specs(config.method, config.bottleneck, config.model)
    init_std, seed = config.bottleneck.init_std, config.loop.seed
    return AppliedMethod(trainable=apply_bottlenecks(gpt, specs, init_std=init_std, seed=seed))


def _apply_prefix(gpt: ShardedGpt, config: RunConfig) -> AppliedMethod:
    gpt.requires_grad_(False)
    beside = _apply_lora(gpt, config) if config.method in LORA_PREFIX_METHODS else AppliedMethod(trainable=[])
    specs = build_prefix_specs(config.method, config.prefix, config.model)
    vectors = put_prefixes(gpt, specs, init_std=config.prefix.init_std, seed=config.loop.seed)
    return AppliedMethod(trainable=[*vectors, *beside.trainable], specs=beside.specs)


_METHODS: dict[str, Callable[[ShardedGpt, RunConfig], AppliedMethod]] = {
    "lora": _apply_lora,
    "full": _apply_full,
    "bitfit": _apply_bitfit,
    **dict.fromkeys(BOTTLENECK_METHODS, _apply_bottlenecks),
    **dict.fromkeys(PREFIX_METHODS, _apply_prefix),
}
assert tuple(_METHODS) == METHODS
