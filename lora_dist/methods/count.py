"""How many parameters a method trains, from the configuration alone."""

import math
from collections.abc import Sequence

from lora_dist.base_shapes import compute_canonical_shapes, count_parameters
from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BOTTLENECK_METHODS
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.lora.trained_base import list_biases, list_trained_base
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS


def count_trainable(config: RunConfig) -> int:
    """Of the whole model, each parameter once."""
    if config.method == "full":
        return count_parameters(config.model)
    if config.method == "bitfit":
        return count_biases(config.model)
    if config.method in BOTTLENECK_METHODS:
        specs = build_bottleneck_specs(config.method, config.bottleneck, config.model)
        return sum(spec.num_parameters for spec in specs)
    if config.method in PREFIX_METHODS:
        return _count_prefixes(config)
    return count_lora(config, build_adapter_specs(config.lora, config.model))


def _count_prefixes(config: RunConfig) -> int:
    """Vectors, and the factors beside them where there are some."""
    vectors = build_prefix_specs(config.method, config.prefix, config.model)
    factors = build_adapter_specs(config.lora, config.model) if config.method in LORA_PREFIX_METHODS else []
    return sum(spec.num_parameters for spec in vectors) + sum(spec.num_parameters for spec in factors)


def count_lora(config: RunConfig, specs: Sequence[AdapterSpec]) -> int:
    """Elements of the adapters and of what trains of the base beside them."""
    lora, model = config.lora, config.model
    names = list_trained_base(specs, model, lora.bias, lora.modules_to_save)
    return _count_elements(names, model) + sum(spec.num_parameters for spec in specs)


def count_biases(model: ModelConfig) -> int:
    """Elements of all biases, the norms' too: 11 hidden_size a layer and hidden_size in GPT-2's form."""
    return _count_elements(list_biases(model), model)


def _count_elements(names: Sequence[str], model: ModelConfig) -> int:
    shapes = compute_canonical_shapes(model)
    return sum(math.prod(shapes[name]) for name in names)
