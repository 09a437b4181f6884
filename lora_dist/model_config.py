"""What a base model is: its family and its own sizes; standard library only."""

from dataclasses import dataclass, field
from typing import Any

from lora_dist.architecture import ARCHITECTURES, Architecture
from lora_dist.delta_sizes import DeltaSizes
from lora_dist.model_checks import check_model


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A decoder, from a Hugging Face checkpoint directory or drawn from the run's seed."""

    name: str
    """Shown in reports."""
    family: str = "gpt2"
    """gpt2 (GPT-2 and GPT-3), llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, qwen3_next, qwen3_5_text,
    qwen3_5_moe_text, granite, seed_oss, ministral3, smollm3, olmo2, olmo3, glm4_moe, minimax_m2, deepseek_v3,
    deepseek_v32, glm_moe_dsa, gpt_oss, phi3, gemma3_text, opt or gpt_neox: what its layers consist of."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and of values, each shared by as many query heads; null means num_heads."""
    head_size: int | None = None
    """Features of one head's query and key; null means hidden_size / num_heads."""
    query_latent_size: int | None = None
    """Features that the queries of all heads come from, of families with latents (deepseek_v3, deepseek_v32,
    glm_moe_dsa); null means the hidden ones, which deepseek_v3 alone can have."""
    kv_latent_size: int | None = None
    """Features that the keys and values of all heads come from, of families with latents."""
    rope_head_size: int | None = None
    """Features of a head that positions turn, its last ones, of families with latents; their key is one for all
    heads."""
    value_head_size: int | None = None
    """Features of one head's value, of families with latents; null elsewhere, where they are as many as its key's."""
    rope_interleaved: bool = False
    """Positions turn neighbouring features as a pair, of families with latents; else those that are half a head
    apart."""
    attended_positions: int | None = None
    """Positions that a position attends to at most, picked by the indexer beside the attention, of deepseek_v32 and
    glm_moe_dsa. Rows up to there attend to all, and an indexer has nothing to compute."""
    indexer_heads: int | None = None
    """Heads of an indexer, of deepseek_v32 and glm_moe_dsa."""
    indexer_head_size: int | None = None
    """Features of one head of an indexer."""
    layers_without_indexer: list[int] = field(default_factory=list)
    """Layers, from 0, that attend to what the last indexer before them has picked, of glm_moe_dsa."""
    stages_begin_at_indexers: bool = False
    """Pipeline stages begin with layers that have an indexer of their own, if they are of less equal size then: what
    rows longer than attended_positions need, since no choice goes from stage to stage."""
    delta_key_heads: int | None = None
    """Heads of queries and keys in a gated DeltaNet, of qwen3_next, qwen3_5_text and qwen3_5_moe_text."""
    delta_value_heads: int | None = None
    """Heads of values there, of which neighbouring ones share a key head."""
    delta_key_size: int | None = None
    """Features of one head's query and key there."""
    delta_value_size: int | None = None
    """Features of one head's value there."""
    delta_kernel_size: int | None = None
    """Positions that its convolution sees, each itself and those just before it."""
    ffn_hidden_size: int
    """Features inside the MLP; of one expert where a layer has several."""
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    tied_output: bool = True
    """The output layer is the embedding."""
    embedding_multiplier: float = 1.0
    """What embeddings are multiplied by, of granite."""
    residual_multiplier: float = 1.0
    """What attention and MLP give is multiplied by before it is added to the residual stream, of granite."""
    logits_divisor: float = 1.0
    """What logits are divided by, of granite."""
    activation: str | None = None
    """Of an MLP without gate, where a family has several: gpt_neox gelu (exact) or gelu_tanh; null means the usual."""
    qk_norm: bool | None = None
    """Queries and keys are normalised head by head, where a family has models with and without: glm4_moe; null means
    as the family usually does."""
    num_experts: int | None = None
    """Experts of a layer, of mixtral, qwen3_moe, qwen3_next, qwen3_5_moe_text, glm4_moe, minimax_m2, deepseek_v3,
    deepseek_v32, glm_moe_dsa and gpt_oss."""
    experts_per_token: int | None = None
    """Of them those that the router picks for each token."""
    normalize_expert_weights: bool = True
    """The weights of a token's experts are made to sum to one; else each stays its share among all of the layer."""
    expert_weight_scale: float = 1.0
    """What these weights are multiplied by at last."""
    num_expert_groups: int = 1
    """Groups of neighbouring experts, of glm4_moe and families with latents; a token's are picked from the best
    groups."""
    groups_per_token: int = 1
    """So many groups."""
    shared_ffn_size: int | None = None
    """Features inside the MLP that every token passes beside its experts, of qwen3_next, qwen3_5_moe_text, glm4_moe and
    families with latents; null means there is none."""
    num_dense_layers: int = 0
    """First layers that have one MLP in the place of experts, of glm4_moe and families with latents."""
    dense_ffn_size: int | None = None
    """Features inside theirs."""
    swiglu_alpha: float | None = None
    """What multiplies the gate inside its sigmoid, of gpt_oss."""
    swiglu_limit: float | None = None
    """What bounds gate and up before they are multiplied, of gpt_oss."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of a head's features that positions turn, its first ones."""
    unturned_layers: list[int] = field(default_factory=list)
    """Layers, from 0, in which positions turn nothing, of smollm3 (NoPE, arXiv:2501.18795)."""
    parallel_residual: bool | None = None
    """Attention and MLP side by side, where a family has it: gpt_neox; false puts them one after the other, null means
    as the family usually does."""
    rope_scaling: dict[str, float] = field(default_factory=dict)
    """{factor: ...} divides every frequency; with low_freq_factor, high_freq_factor and
    original_max_position_embeddings as well, Llama 3's rule; with beta_fast, beta_slow,
    original_max_position_embeddings and attention_factor YaRN's, with truncate: 0 too without rounding where its ramp
    begins and ends. attention_factor multiplies cosines and sines."""
    query_growth: float = 0.0
    """Queries at position p are multiplied by 1 + query_growth log(1 + floor(p / original_max_position_embeddings)), of
    ministral3, with the context that YaRN starts from; 0 leaves them."""
    rope_divisors: list[float] = field(default_factory=list)
    """What divides each frequency: LongRoPE's short factors. Empty means none."""
    sliding_window: int | None = None
    """Positions that a position sees, itself and those just before it; null means all before it."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers, from 0, whose positions see all before them whatever sliding_window says; beside gated DeltaNets
    those with attention."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies under sliding_window, which nothing scales; null means those of all layers."""
    attention_scale: float | None = None
    """What scores are multiplied by; null means head_size^-0.5."""
    checkpoint: str | None = None
    """Directory with config.json and safetensors; null draws the weights from loop.seed."""
    wrapper: str | None = None
    """model_type of a checkpoint that sees pictures too, whose text model this is: gemma3, mistral3, kimi_k25,
    qwen3_5, qwen3_5_moe or qwen3_vl_moe; null where the checkpoint is a text model."""
    stacked_experts: str | None = None
    """Where the checkpoint's files have one tensor for all experts of a layer, as files of transformers 5 and Qwen3.5's
    can: out_in, or as Qwen3-VL's in_out; null where each expert has its own. What is written has them so too."""
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
    """Of the linears' frozen weights: native (the run's dtype), nf4, nf4_double, fp8, or mxfp4 of experts' alone."""

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.family]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def num_query_groups(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def selects(self, num_positions: int) -> bool:
        """Whether indexers have something to choose in rows of so many positions."""
        return self.attended_positions is not None and num_positions > self.attended_positions

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer picks itself what it attends to."""
        return self.architecture.sparse_attention and layer not in self.layers_without_indexer

    def sees_window(self, layer: int) -> bool:
        """Whether `sliding_window` bounds what a layer's positions see."""
        return self.sliding_window is not None and layer not in self.full_attention_layers

    def has_delta_net(self, layer: int) -> bool:
        """Whether a layer has a gated DeltaNet in the place of attention."""
        return self.architecture.delta_layers and layer not in self.full_attention_layers

    def turns(self, layer: int) -> bool:
        """Whether positions turn a layer's queries and keys."""
        return self.architecture.rotary and layer not in self.unturned_layers

    def has_experts(self, layer: int) -> bool:
        return self.num_experts is not None and layer >= self.num_dense_layers

    def find_mlp_size(self, layer: int) -> int:
        """Features inside the layer's MLP, or inside each of its experts."""
        if self.dense_ffn_size is not None and not self.has_experts(layer):
            return self.dense_ffn_size
        return self.ffn_hidden_size

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """Features inside every kind of MLP that the model has."""
        return tuple(filter(None, (self.ffn_hidden_size, self.dense_ffn_size, self.shared_ffn_size)))

    @property
    def has_qk_norm(self) -> bool:
        return self.architecture.qk_norm if self.qk_norm is None else self.qk_norm

    @property
    def rotary_size(self) -> int:
        """Features of a head that positions turn."""
        if self.rope_head_size is not None:
            return self.rope_head_size
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
    def projected_query_size(self) -> int:
        """Features of all query heads together, with their gates where they have some."""
        return self.query_size * (2 if self.architecture.gated_attention else 1)

    @property
    def value_dim(self) -> int:
        """Features of one head's value."""
        return self.head_dim if self.value_head_size is None else self.value_head_size

    @property
    def context_size(self) -> int:
        """Features that all heads give together, into the projection back to hidden_size."""
        return self.num_heads * self.value_dim

    @property
    def split_sizes(self) -> dict[str, int]:
        """Features into the linears that base_format is for and whose inputs TP splits, by what to call these."""
        mlp = {"down_proj (model.ffn_hidden_size)": self.ffn_hidden_size}
        if self.base_format == "mxfp4":
            return mlp
        others = {
            "down_proj (model.dense_ffn_size)": self.dense_ffn_size or 0,
            "shared_down_proj (model.shared_ffn_size)": self.shared_ffn_size or 0,
        }
        return {"o_proj": self.context_size, "out_proj": self.delta_sizes.value_dim, **mlp, **others}

    @property
    def whole_sizes(self) -> dict[str, int]:
        """Features into those whose inputs TP leaves whole, by what to call these."""
        hidden = {"the linears on model.hidden_size": self.hidden_size}
        if self.base_format == "mxfp4":
            return hidden
        latents = {"q_b_proj": self.query_latent_size or 0, "kv_b_proj": self.kv_latent_size or 0}
        return hidden | latents

    @property
    def delta_sizes(self) -> DeltaSizes:
        """Of the gated DeltaNets, where the family has them."""
        return DeltaSizes(
            key_heads=self.delta_key_heads or 0,
            value_heads=self.delta_value_heads or 0,
            key_size=self.delta_key_size or 0,
            value_size=self.delta_value_size or 0,
            kernel_size=self.delta_kernel_size or 0,
            apart=self.architecture.apart_delta_inputs,
        )

    @property
    def kv_size(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim
