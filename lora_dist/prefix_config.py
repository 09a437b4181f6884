"""Options of the methods that train vectors in the place of tokens; standard library only."""

from dataclasses import dataclass

from lora_dist.refusals import require

LORA_PREFIX_METHODS = ("lora_prefix_embed", "lora_prefix_layer")
"""LoRA with either of the two: the paper's LoRA+PE and LoRA+PL."""
PREFIX_METHODS = ("prefix_embed", "prefix_layer", *LORA_PREFIX_METHODS)


@dataclass(kw_only=True, slots=True)
class PrefixConfig:
    """Trained vectors before the context and before the target (section 5.1 of the paper, Li & Liang, 2021)."""

    num_prefix: int = 8
    """Positions before the context (l_p in the paper); they count in data.seq_len."""
    num_infix: int = 8
    """Positions between the context's end token and the target (l_i in the paper)."""
    init_std: float = 0.02
    """Of the vectors at the start, normal."""

    def __post_init__(self) -> None:
        for key in ("num_prefix", "num_infix"):
            require(getattr(self, key) >= 0, f"prefix.{key}={getattr(self, key)} must not be negative")
        require(self.num_slots > 0, "prefix.num_prefix=0 and prefix.num_infix=0 train nothing; set one above 0")
        require(self.init_std > 0, f"prefix.init_std={self.init_std} must be positive")

    @property
    def num_slots(self) -> int:
        """Positions that an example gets."""
        return self.num_prefix + self.num_infix

    def check_fits(self, seq_len: int) -> None:
        """ValueError where a row has no room for the shortest example: an end token and one token of the target."""
        require(
            self.num_slots + 2 <= seq_len,
            f"prefix.num_prefix={self.num_prefix} and prefix.num_infix={self.num_infix} leave no room for an example in"
            f" data.seq_len={seq_len}; use fewer, or a longer seq_len",
        )
