"""What the models of each family have in common; standard library only."""

from dataclasses import dataclass, replace
from typing import Any

OUT_IN, IN_OUT = "out_in", "in_out"
"""How files with one tensor for all experts of a layer have a matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What all models of a family have in common."""

    rotary: bool = False
    """Positions turn queries and keys (arXiv:2104.09864); otherwise a learned vector is added to the embedding."""
    position_offset: int = 0
    """Rows of the learned table before that of position 0."""
    grouped_query: bool = False
    """Several query heads may share a key and a value head (arXiv:2305.13245)."""
    rms_norm: bool = False
    """Norms divide by the root mean square and have no bias (arXiv:1910.07467); otherwise LayerNorm."""
    qk_norm: bool = False
    """Each head's queries and keys are normalised before they are turned."""
    optional_qk_norm: bool = False
    """A model may have that or not, whatever is usual."""
    whole_qk_norm: bool = False
    """Instead the queries of all heads are normalised together, and so are the keys."""
    unit_norms: bool = False
    """Norms multiply by one more than their weight."""
    input_norms: bool = True
    """What attention and the MLP read is normalised."""
    output_norms: bool = False
    """What attention and the MLP give is normalised before it is added to the residual stream."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of hidden_size."""
    multipliers: bool = False
    """A model may multiply its embeddings, and what attention and the MLP give, and divide its logits."""
    gated: bool = False
    """The MLP's activation is f(gate) * up (arXiv:2002.05202)."""
    gate_activation: str = "silu"
    """f: silu or gelu_tanh."""
    bounded_gate: bool = False
    """Instead f is (up + 1) gate sigmoid(swiglu_alpha gate), gate and up bounded by swiglu_limit (arXiv:2508.10925)."""
    attention_sinks: bool = False
    """Each head has a learned score that joins the softmax's denominator (arXiv:2508.10925)."""
    latent_attention: bool = False
    """Keys and values, and in most models queries too, come from narrow vectors, their latents, one for all heads
    (arXiv:2405.04434, section 2.1)."""
    sparse_attention: bool = False
    """Of the positions before it a position attends to some, which an indexer beside the attention picks
    (arXiv:2512.02556, section 2.1)."""
    interleaved_indexer: bool = False
    """Positions turn neighbouring features of an indexer as a pair; else those that are half apart."""
    gated_attention: bool = False
    """What a head gives is multiplied by the sigmoid of a gate, which comes out of the same linear as its query
    (arXiv:2505.06708)."""
    delta_layers: bool = False
    """All layers but those that full_attention_layers names have a gated DeltaNet in attention's place
    (arXiv:2412.06464)."""
    apart_delta_inputs: bool = False
    """What enters a gated DeltaNet's heads comes out of four linears: of queries, keys and values, and of each gate."""
    experts: bool = False
    """Each layer has several MLPs, of which a router picks some for each token (arXiv:2101.03961, arXiv:2401.04088)."""
    shared_expert: bool = False
    """Beside them a model may have one that every token passes (arXiv:2401.06066, section 3.2), and layers without
    experts before those with them."""
    gated_shared_expert: bool = False
    """All models have that one, and what it gives is multiplied by the sigmoid of a gate; none has the layers."""
    sigmoid_router: bool = False
    """Its scores are sigmoids, to which offsets are added for the choice alone (arXiv:2412.19437, section 2.1.2)."""
    activations: tuple[str, ...] = ("gelu_tanh",)
    """That an MLP without gate may have, the usual one first: gelu_tanh, gelu (exact), relu."""
    partial_rotary: bool = False
    """A model may turn some of a head's features alone."""
    unturned_layers: bool = False
    """A model may have layers in which positions turn nothing."""
    parallel_residual: bool = False
    """A model's attention and MLP may both read the layer's input, their outputs being added to it together."""
    windows: bool = False
    """A model may bound how far back a position sees."""
    linear_biases: bool = True
    """Every linear of a layer has a bias, a router too."""
    qkv_biases: bool = False
    """Those of q, k and v have one, whatever linear_biases says."""
    drops_embedding: bool = True
    """Dropout in training is on the embedding too, beside what attention and the MLP give."""
    growing_queries: bool = False
    """A model may multiply its queries by what grows with the logarithm of their position."""
    fused_targets: tuple[tuple[str, ...], ...] = ()
    """Targets that transformers makes with one linear, to which PEFT gives one adapter."""

    @property
    def has_biases(self) -> bool:
        return self.linear_biases or self.qkv_biases or not self.rms_norm


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Architecture(rotary=True, grouped_query=True, rms_norm=True, gated=True, linear_biases=False)
_OLMO2 = replace(_LLAMA, whole_qk_norm=True, input_norms=False, output_norms=True)
_DEEPSEEK_V3 = replace(
    _LLAMA, grouped_query=False, latent_attention=True, experts=True, shared_expert=True, sigmoid_router=True
)
_QWEN3_NEXT = replace(
    _LLAMA, qk_norm=True, unit_norms=True, partial_rotary=True, gated_attention=True, delta_layers=True
)
_GATED_EXPERTS: dict[str, Any] = {"experts": True, "shared_expert": True, "gated_shared_expert": True}
_APART: dict[str, Any] = {
    "apart_delta_inputs": True,
    "fused_targets": (("in_proj_q", "in_proj_k", "in_proj_v"),),
}
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(fused_targets=(_QKV,)),
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, windows=True),
    "qwen2": replace(_LLAMA, qkv_biases=True, windows=True),
    "qwen3": replace(_LLAMA, qk_norm=True, windows=True),
    "mixtral": replace(_LLAMA, windows=True, experts=True),
    "qwen3_moe": replace(_LLAMA, qk_norm=True, experts=True),
    "glm4_moe": replace(
        _LLAMA,
        qkv_biases=True,
        optional_qk_norm=True,
        partial_rotary=True,
        experts=True,
        shared_expert=True,
        sigmoid_router=True,
    ),
    "granite": replace(_LLAMA, multipliers=True),
    "seed_oss": replace(_LLAMA, qkv_biases=True, drops_embedding=False),
    "ministral3": replace(_LLAMA, windows=True, growing_queries=True),
    "smollm3": replace(_LLAMA, windows=True, unturned_layers=True),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows=True),
    "minimax_m2": replace(_LLAMA, whole_qk_norm=True, partial_rotary=True, experts=True, sigmoid_router=True),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": replace(_DEEPSEEK_V3, sparse_attention=True),
    "glm_moe_dsa": replace(_DEEPSEEK_V3, sparse_attention=True, interleaved_indexer=True),
    "gpt_oss": replace(_LLAMA, linear_biases=True, windows=True, experts=True, bounded_gate=True, attention_sinks=True),
    "qwen3_next": replace(_QWEN3_NEXT, **_GATED_EXPERTS),
    "qwen3_5_text": replace(_QWEN3_NEXT, **_APART),
    "qwen3_5_moe_text": replace(_QWEN3_NEXT, **_APART, **_GATED_EXPERTS),
    "phi3": replace(_LLAMA, windows=True, partial_rotary=True, fused_targets=(_QKV, ("gate_proj", "up_proj"))),
    "gemma3_text": replace(
        _LLAMA,
        qk_norm=True,
        windows=True,
        unit_norms=True,
        output_norms=True,
        scaled_embedding=True,
        gate_activation="gelu_tanh",
    ),
    "opt": Architecture(activations=("relu",), position_offset=2),
    "gpt_neox": Architecture(
        rotary=True,
        partial_rotary=True,
        activations=("gelu", "gelu_tanh"),
        fused_targets=(_QKV,),
        parallel_residual=True,
    ),
}
