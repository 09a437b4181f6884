"""What a base model is: its family and its own sizes; standard library only."""

from dataclasses import dataclass, field
from typing import Any

from lora_dist.architecture import ARCHITECTURES, Architecture
from lora_dist.base_format import BASE_FORMATS
from lora_dist.refusals import require, require_one_of

ROPE_SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor"}),
    "longrope": frozenset({"attention_factor"}),
}
"""Keys of model.rope_scaling by what transformers calls the rule."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A decoder, from a Hugging Face checkpoint directory or drawn from the run's seed."""

    name: str
    """Shown in reports."""
    family: str = "gpt2"
    """gpt2 (GPT-2 and GPT-3), llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, phi3, gemma3_text, opt or gpt_neox:
    what its layers consist of."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and of values, each shared by as many query heads; null means num_heads."""
    head_size: int | None = None
    """Features of one head; null means hidden_size / num_heads."""
    ffn_hidden_size: int
    """Features inside the MLP; of one expert where a layer has several."""
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    tied_output: bool = True
    """The output layer is the embedding."""
    activation: str | None = None
    """Of an MLP without gate, where a family has several: gpt_neox gelu (exact) or gelu_tanh; null means the usual."""
    num_experts: int | None = None
    """Experts of a layer, of mixtral and qwen3_moe."""
    experts_per_token: int | None = None
    """Of them those that the router picks for each token."""
    normalize_expert_weights: bool = True
    """The weights of a token's experts are made to sum to one; else each stays its share among all of the layer."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of a head's features that positions turn, its first ones."""
    parallel_residual: bool | None = None
    """Attention and MLP side by side, where a family has it: gpt_neox; false puts them one after the other, null means
    as the family usually does."""
    rope_scaling: dict[str, float] = field(default_factory=dict)
    """{factor: ...} divides every frequency; with low_freq_factor, high_freq_factor and
    original_max_position_embeddings as well, Llama 3's rule; with beta_fast, beta_slow,
    original_max_position_embeddings and attention_factor YaRN's. attention_factor multiplies cosines and sines."""
    rope_divisors: list[float] = field(default_factory=list)
    """What divides each frequency: LongRoPE's short factors. Empty means none."""
    sliding_window: int | None = None
    """Positions that a position sees, itself and those just before it; null means all before it."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers, from 0, whose positions see all before them whatever sliding_window says."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies under sliding_window, which nothing scales; null means those of all layers."""
    attention_scale: float | None = None
    """What scores are multiplied by; null means head_size^-0.5."""
    checkpoint: str | None = None
    """Directory with config.json and safetensors; null draws the weights from loop.seed."""
    tokenizer: str | None = None
    """Directory with the tokenizer's files; null means the checkpoint directory."""
    chat_template: str | None = None
    """Jinja file of a chat template; null means the tokenizer's own."""
    chat_values: dict[str, Any] = field(default_factory=dict)
    """What the chat template is told by name, e.g. {enable_thinking: false}."""
    chat_date: str | None = None
    """What a chat template writes as today's date, e.g. 26 Jul 2024; null has it do without, as most can, so that a
    text is the same tomorrow."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    base_format: str = "native"
    """Of the linears' frozen weights: native (the run's dtype), nf4, nf4_double or fp8."""

    def __post_init__(self) -> None:
        require_one_of("model.family", self.family, tuple(ARCHITECTURES))
        require_one_of("model.base_format", self.base_format, BASE_FORMATS)
        for key in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "ffn_hidden_size",
            "vocab_size",
            "max_position_embeddings",
            "sliding_window",
            "num_experts",
            "experts_per_token",
        ):
            size = getattr(self, key)
            require(size is None or size >= 1, f"model.{key}={size} must be at least 1")
        for key in ("hidden_dropout", "attention_dropout"):
            require(0.0 <= getattr(self, key) < 1.0, f"model.{key}={getattr(self, key)} must lie in [0, 1)")
        if self.activation is not None:
            require(
                not self.architecture.gated,
                f"model.activation={self.activation}: {self.family} has a gate; leave it null",
            )
            require_one_of("model.activation", self.activation, self.architecture.activations)
        require(
            not self.parallel_residual or self.architecture.parallel_residual,
            f"model.parallel_residual={self.parallel_residual}: a layer of {self.family} has the MLP after the"
            " attention; leave it null",
        )
        self._check_experts()
        self._check_windows()
        self._check_heads()
        if self.architecture.rotary:
            self._check_rotary()

    def _check_experts(self) -> None:
        num_experts, num_picked = self.num_experts, self.experts_per_token
        if not self.architecture.experts:
            require(
                num_experts is None and num_picked is None,
                f"model.num_experts={num_experts} and experts_per_token={num_picked}: a layer of {self.family} has one"
                " MLP; leave them null",
            )
            return
        require(
            num_experts is not None and num_picked is not None,
            f"model.family={self.family} needs model.num_experts and model.experts_per_token",
        )
        require(
            num_picked <= num_experts,  # type: ignore[operator]
            f"model.experts_per_token={num_picked} exceeds model.num_experts={num_experts}",
        )

    def _check_windows(self) -> None:
        require(
            self.sliding_window is None or self.architecture.windows,
            f"model.sliding_window={self.sliding_window}: {self.family} sees all positions before; leave it null",
        )
        for key in ("full_attention_layers", "local_rope_theta"):
            require(
                not getattr(self, key) or self.sliding_window is not None,
                f"model.{key}={getattr(self, key)} has no meaning without model.sliding_window",
            )
        for layer in self.full_attention_layers:
            require(
                0 <= layer < self.num_layers,
                f"model.full_attention_layers: there is no layer {layer} of {self.num_layers}",
            )
        for key in ("local_rope_theta", "attention_scale"):
            value = getattr(self, key)
            require(value is None or value > 0, f"model.{key}={value} must be positive")

    def _check_heads(self) -> None:
        require(
            self.head_size is not None or self.hidden_size % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}",
        )
        require(
            self.num_heads % self.num_query_groups == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )

        require(
            self.architecture.grouped_query or self.num_query_groups == self.num_heads,
            f"model.num_kv_heads={self.num_kv_heads} differs from model.num_heads={self.num_heads}, and"
            f" model.family={self.family} has as many of both; leave it null",
        )

    def _check_rotary(self) -> None:
        require(
            0 < self.rotary_fraction <= 1, f"model.rotary_fraction={self.rotary_fraction} must lie above 0, and up to 1"
        )
        require(
            self.rotary_fraction == 1 or self.architecture.partial_rotary,
            f"model.rotary_fraction={self.rotary_fraction}: {self.family} turns whole heads; leave it 1",
        )
        require(
            self.rotary_size % 2 == 0 and self.rotary_size > 0,
            f"model.head_size={self.head_dim} must be even for rotary positions, and so must the"
            f" {self.rotary_size} of its features that model.rotary_fraction={self.rotary_fraction} turns",
        )
        require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta} must be positive")
        ways = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys in ROPE_SCALINGS.values())
        require(
            set(self.rope_scaling) in ROPE_SCALINGS.values(),
            f"model.rope_scaling has {', '.join(sorted(self.rope_scaling))}; it takes {ways}",
        )
        if set(self.rope_scaling) == ROPE_SCALINGS["longrope"] or self.rope_divisors:
            self._check_longrope()

    def _check_longrope(self) -> None:
        require(
            set(self.rope_scaling) == ROPE_SCALINGS["longrope"] and self.checkpoint is not None,
            "model.rope_divisors are LongRoPE's, with model.rope_scaling={attention_factor} and a model.checkpoint:"
            " without them leave it empty",
        )
        require(
            len(self.rope_divisors) == self.rotary_size // 2 and all(divisor > 0 for divisor in self.rope_divisors),
            f"model.rope_divisors={self.rope_divisors}: LongRoPE takes a positive number for each of the"
            f" {self.rotary_size // 2} frequencies",
        )

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.family]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def num_query_groups(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def sees_window(self, layer: int) -> bool:
        """Whether `sliding_window` bounds what a layer's positions see."""
        return self.sliding_window is not None and layer not in self.full_attention_layers

    @property
    def rotary_size(self) -> int:
        """Features of a head that positions turn."""
        return int(self.rotary_fraction * self.head_dim)

    @property
    def mlp_activation(self) -> str:
        """Of an MLP without gate."""
        return self.architecture.activations[0] if self.activation is None else self.activation

    @property
    def has_parallel_residual(self) -> bool:
        """Attention and MLP both read the layer's input."""
        return self.architecture.parallel_residual if self.parallel_residual is None else self.parallel_residual

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; an output layer that is the embedding counts once."""
        h, kind = self.hidden_size, self.architecture
        norm = h if kind.rms_norm else 2 * h
        positions = 0 if kind.rotary else self.max_position_embeddings + kind.position_offset
        vocabulary = self.vocab_size * (1 if self.tied_output else 2)
        num_norms = 4 if kind.output_norms else 2
        return self.num_layers * (self._count_linears() + num_norms * norm) + (vocabulary + positions) * h + norm

    def _count_linears(self) -> int:
        """Weights and biases of one layer's linears and router, and its q and k norms."""
        h, f, q, kv, kind = self.hidden_size, self.ffn_hidden_size, self.query_size, self.kv_size, self.architecture
        num_inner = 2 if kind.gated else 1
        mlp = (num_inner + 1) * h * f
        if self.num_experts is not None:
            mlp = self.num_experts * (mlp + h)  # and its row of the router
        weights = h * (q + 2 * kv) + q * h + mlp
        qkv_biases = q + 2 * kv if kind.linear_biases or kind.qkv_biases else 0
        other_biases = h + num_inner * f + h if kind.linear_biases else 0
        return weights + qkv_biases + other_biases + (2 * self.head_dim if kind.qk_norm else 0)
