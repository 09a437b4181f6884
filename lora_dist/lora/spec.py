"""What one adapter is: which linear of which layer, its rank and its scale."""

from dataclasses import dataclass

CANONICAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One pair of factors: A [lora_rank, in_features], B [out_features, lora_rank], whole (not sharded)."""

    layer: int
    """Zero-based over the whole model."""
    target: str
    """Canonical name: q_proj, k_proj, v_proj, o_proj, up_proj or down_proj."""
    lora_rank: int
    alpha: float
    in_features: int
    out_features: int
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.target}"

    @property
    def scaling(self) -> float:
        """Factor on B A x (section 4.1 of the paper)."""
        return self.alpha / self.lora_rank

    @property
    def num_parameters(self) -> int:
        return self.lora_rank * (self.in_features + self.out_features)
