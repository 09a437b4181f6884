"""What `lora-dist bench` compares; standard library only."""

from dataclasses import dataclass, field

from lora_dist.refusals import require, require_one_of

OUR_CONTENDERS = (
    *("lora", "full", "lora_recompute", "full_recompute", "lora_compiled", "full_compiled"),
    *("lora_graphs", "full_graphs"),
)
CONTENDERS = (*OUR_CONTENDERS, "peft", "peft_tuned", "hf_full")


@dataclass(kw_only=True, slots=True)
class BenchConfig:
    """What `lora-dist bench` times side by side, on random tokens of data.seq_len."""

    contenders: list[str] = field(default_factory=lambda: ["lora", "full", "peft", "peft_tuned"])
    """lora and full are this project's under loop.recompute, lora_recompute and full_recompute with full recomputation,
    lora_compiled and full_compiled with compile=true, lora_graphs and full_graphs with cuda_graphs=true; peft,
    peft_tuned and hf_full are transformers with PEFT or whole."""
    num_rounds: int = 10
    """Timed rounds; a round is one step of every contender."""
    num_warmup_rounds: int = 3
    target_fraction: float = 1.0
    """Share of each row's positions, its last ones, that the loss is on."""
    num_threads: int = 1
    """CPU threads of a contender; on a GPU torch's default is left alone."""

    def __post_init__(self) -> None:
        for contender in self.contenders:
            require_one_of("bench.contenders", contender, CONTENDERS)
        require(len(self.contenders) == len(set(self.contenders)), "bench.contenders names one twice")
        require(bool(self.contenders), "bench.contenders is empty; name at least one, e.g. [lora,peft]")
        for key in ("num_rounds", "num_warmup_rounds", "num_threads"):
            require(getattr(self, key) >= 1, f"bench.{key}={getattr(self, key)} must be at least 1")
        require(0.0 < self.target_fraction <= 1.0, f"bench.target_fraction={self.target_fraction} must lie in (0, 1]")

    @property
    def methods(self) -> list[str]:
        """What the contenders train."""
        return ["full" if "full" in contender else "lora" for contender in self.contenders]
