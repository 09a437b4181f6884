"""AdapterL: one bottleneck a layer, on its output, with a LayerNorm of its own (Lin et al., arXiv:2004.03829)."""

from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.config import RunConfig
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter


def apply_adapter_l(gpt: ShardedGpt, config: RunConfig) -> list[TrainableParameter]:
    """h + up(activation(down(norm(h)))) of each layer's output h."""
    specs = build_bottleneck_specs("adapter_l", config.bottleneck, config.model)
    return apply_bottlenecks(gpt, specs, init_std=config.bottleneck.init_std, seed=config.loop.seed)
