"""What one adapter is: which linear of which layer, its rank and its scale."""

import math
from dataclasses import dataclass

CANONICAL_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"),
    *("in_proj_qkvz", "in_proj_ba", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "in_proj_b", "in_proj_a"),
    *("out_proj",),
    *("gate_proj", "up_proj", "down_proj"),
    *("shared_gate_proj", "shared_up_proj", "shared_down_proj"),
)
"""Those with `_a` make the latents of queries and of keys and values, those with `_b` the heads out of them; those with
`in` and `out` are a gated DeltaNet's; those with `shared` are of the MLP that every token passes beside the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One pair of factors: A [lora_rank, in_features], B [out_features, lora_rank], whole (not sharded).

    Of a layer's experts, which have a linear each, one pair each: A and B hold them one after the other.
    """

    layer: int
    """Zero-based over the whole model."""
    target: str
    """Canonical name, one of CANONICAL_TARGETS."""
    lora_rank: int
    alpha: float
    in_features: int
    out_features: int
    dropout: float = 0.0
    rank_stabilized: bool = False
    """Scaled by alpha / sqrt(lora_rank), so that the rank does not change the update's size (arXiv:2312.03732)."""
    shares_a: bool = False
    """Its A is also that of the other projections fused with it: one adapter on a whole c_attn, from elsewhere."""

    use_dora: bool = False
    """Each output row has a trained length besides (arXiv:2402.09353)."""
    num_experts: int | None = None
    """That have a linear of this name each; None where every token passes the one there is."""

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.target}"

    @property
    def scaling(self) -> float:
        """Factor on B A x (section 4.1 of the paper)."""
        return self.alpha / (math.sqrt(self.lora_rank) if self.rank_stabilized else self.lora_rank)

    @property
    def stacked_rank(self) -> int:
        """Rows of A and columns of B, all experts' together."""
        return (self.num_experts or 1) * self.lora_rank

    @property
    def num_parameters(self) -> int:
        factors = self.stacked_rank * (self.in_features + self.out_features)
        return factors + (self.out_features if self.use_dora else 0)
