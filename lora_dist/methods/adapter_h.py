"""AdapterH: bottlenecks on what attention and MLP add to the residual (Houlsby et al., arXiv:1902.00751)."""

from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.config import RunConfig
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter


def apply_adapter_h(gpt: ShardedGpt, config: RunConfig) -> list[TrainableParameter]:
    """The paper's comparison keeps the base's norms frozen: its counts for GPT-3 have no term for them."""
    specs = build_bottleneck_specs("adapter_h", config.bottleneck, config.model)
    return apply_bottlenecks(gpt, specs, init_std=config.bottleneck.init_std, seed=config.loop.seed)
