"""Every parameter of a base model by canonical name, with its whole shape; pure."""

from lora_dist.model_config import ModelConfig


def compute_canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model by canonical name; a tied output layer is none of its own."""
    kind, h = model.architecture, model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (model.vocab_size, h)}
    if not kind.rotary:
        num_positions = model.max_position_embeddings + kind.position_offset
        shapes["embedding.position_embeddings.weight"] = (num_positions, h)
    layer = _compute_layer_shapes(model)
    for number in range(model.num_layers):
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= _norm("decoder.final_layernorm", h, model)
    return shapes if model.tied_output else {**shapes, "output_layer.weight": (model.vocab_size, h)}


def _compute_layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    kind, h, f, q = model.architecture, model.hidden_size, model.ffn_hidden_size, model.query_size
    linears = {
        "self_attention.linear_proj": (h, q, kind.linear_biases),
        "self_attention.linear_qkv": (q + 2 * model.kv_size, h, kind.linear_biases or kind.qkv_biases),
    }
    for mlp in _list_mlps(model):
        linears[f"{mlp}.linear_fc1"] = ((2 if kind.gated else 1) * f, h, kind.linear_biases)
        linears[f"{mlp}.linear_fc2"] = (h, f, kind.linear_biases)
    if model.num_experts is not None:
        linears["mlp.router"] = (model.num_experts, h, False)
    shapes = _norm("input_layernorm", h, model) | _norm("pre_mlp_layernorm", h, model)
    for name, (num_out, num_in, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        shapes |= {f"{name}.bias": (num_out,)} if has_bias else {}
    if kind.output_norms:
        shapes |= _norm("self_attention.output_layernorm", h, model) | _norm("mlp.output_layernorm", h, model)
    if kind.qk_norm:
        for name in ("q_layernorm", "k_layernorm"):
            shapes |= _norm(f"self_attention.{name}", model.head_dim, model)
    return shapes


def _list_mlps(model: ModelConfig) -> list[str]:
    """The layer's MLP, or each of its experts."""
    if model.num_experts is None:
        return ["mlp"]
    return [f"mlp.experts.{expert}" for expert in range(model.num_experts)]


def _norm(name: str, size: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight",) if model.architecture.rms_norm else ("weight", "bias")
    return {f"{name}.{kind}": (size,) for kind in kinds}
