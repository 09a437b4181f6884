"""How many parameters a method trains, from the configuration alone."""

import math
from collections.abc import Sequence

from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BOTTLENECK_METHODS
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.files.hf_gpt2 import compute_hf_shapes, find_hf_tensor
from lora_dist.files.peft_gpt2 import list_bias_names, list_module_names
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.prefix.spec import build_prefix_specs
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS


def count_trainable(config: RunConfig) -> int:
    """Of the whole model, each parameter once."""
    if config.method == "full":
        return config.model.num_parameters
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
    lora, model, shapes = config.lora, config.model, compute_hf_shapes(config.model)
    names = [*list_bias_names(specs, model, lora.bias), *list_module_names(model, lora.modules_to_save)]
    base = sum(math.prod(shapes[find_hf_tensor(name).name]) for name in names)
    return base + sum(spec.num_parameters for spec in specs)


def count_biases(model: ModelConfig) -> int:
    """Elements of all biases, the norms' too: 11 hidden_size a layer and hidden_size in GPT-2's form."""
    return sum(math.prod(shape) for name, shape in compute_hf_shapes(model).items() if name.endswith(".bias"))
