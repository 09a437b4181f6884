"""Options of the methods that put bottlenecks into the layers; standard library only."""

from dataclasses import dataclass

from lora_dist.refusals import require, require_one_of

BOTTLENECK_METHODS = ("adapter_h", "adapter_l")
ACTIVATIONS = ("gelu", "relu")


@dataclass(kw_only=True, slots=True)
class BottleneckConfig:
    """Adapters as layers of their own: Houlsby et al. (arXiv:1902.00751), Lin et al. (arXiv:2004.03829)."""

    size: int = 8
    """Features between the two projections (r in the paper's count)."""
    activation: str = "gelu"
    """Between the two projections: gelu or relu."""
    init_std: float = 0.01
    """Of both projections' weights, normal and cut off at two standard deviations; biases start at zero."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"bottleneck.size={self.size} must be at least 1")
        require_one_of("bottleneck.activation", self.activation, ACTIVATIONS)
        require(self.init_std > 0, f"bottleneck.init_std={self.init_std} must be positive")
