"""BitFit: every bias of the frozen base trains, those of its norms too (section 5.1 of the paper)."""

from lora_dist.lora.trained_base import list_biases
from lora_dist.mcore.adapters import enable_base
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter


def apply_bitfit(gpt: ShardedGpt) -> list[TrainableParameter]:
    """Freeze all but the biases. ValueError where the model has none."""
    gpt.requires_grad_(False)
    return enable_base(gpt, list_biases(gpt.model))
