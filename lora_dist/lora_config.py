"""How adapters are put to a base model; standard library only."""

from dataclasses import dataclass, field

from lora_dist.refusals import require, require_one_of


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685, section 4): W = W0 + (alpha / rank) B A."""

    rank: int = 4
    """Inner dimension of the two factors (`lora_rank` in code)."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Probability of zeroing an element of the adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Canonical names, aliases, or regular expressions over `layers.N.target`. `all` leaves out experts' linears."""
    layers: list[str] | None = None
    """Zero-based layers that get adapters, each a number or a range with both ends: [0-11,23]; null means all."""
    bias: str = "none"
    """Biases that train too: none, lora_only (those of adapted linears) or all."""
    init: str = "gaussian"
    """gaussian (A Gaussian, B zero), or pissa (the weight's principal part; the frozen base becomes the rest)."""
    use_dora: bool = False
    """Train the length of each output row besides (DoRA, arXiv:2402.09353)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Whole modules that train too, by transformers' names: GPT-2's wte (embedding and tied output layer), wpe, ln_1,
    ln_2 (all layers'), ln_f; Llama's embed_tokens, lm_head, norm, input_layernorm, post_attention_layernorm."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank of the targets a name, alias or expression matches, instead of `rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank={self.rank} must be at least 1")
        require(0 < self.alpha < float("inf"), f"lora.alpha={self.alpha} must be positive and finite")
        require(0.0 <= self.dropout < 1.0, f"lora.dropout={self.dropout} must lie in [0, 1)")
        require_one_of("lora.bias", self.bias, ("none", "lora_only", "all"))
        require_one_of("lora.init", self.init, ("gaussian", "pissa"))
        require(
            not (self.use_dora and self.init == "pissa"),
            "lora.use_dora=true starts from the base's own rows, lora.init=pissa changes them; use one of them",
        )
        require(bool(self.target_modules), "lora.target_modules is empty; name at least one, e.g. [q_proj,v_proj]")
        for pattern, rank in self.rank_pattern.items():
            require(rank >= 1, f"lora.rank_pattern.{pattern}={rank} must be at least 1")
        for pattern, alpha in self.alpha_pattern.items():
            require(0 < alpha < float("inf"), f"lora.alpha_pattern.{pattern}={alpha} must be positive and finite")

    @property
    def has_factors_alone(self) -> bool:
        """True where nothing trains, or changes, but A and B."""
        return self.bias == "none" and not self.modules_to_save and self.init == "gaussian" and not self.use_dora
