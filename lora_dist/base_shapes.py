"""Every parameter of a base model by canonical name, with its whole shape; pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod

from lora_dist.model_config import ModelConfig
from lora_dist.refusals import require

CHOICE_OFFSETS = "mlp.router.choice_offsets"
"""Of a layer, by canonical name: a tensor that is kept with the parameters and is none, since nothing trains it."""


def compute_canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the whole model by canonical name; a tied output layer is none of its own."""
    kind, h = model.architecture, model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (model.vocab_size, h)}
    if not kind.rotary:
        num_positions = model.max_position_embeddings + kind.position_offset
        shapes["embedding.position_embeddings.weight"] = (num_positions, h)
    for layer in range(model.num_layers):
        own = compute_layer_shapes(model, layer)
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes |= _norm("decoder.final_layernorm", h, model)
    return shapes if model.tied_output else {**shapes, "output_layer.weight": (model.vocab_size, h)}


def count_parameters(model: ModelConfig) -> int:
    """Of the whole model; an output layer that is the embedding counts once."""
    return count_elements(compute_canonical_shapes(model))


def compute_indexer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer's indexer; none is a parameter, since nothing trains them."""
    heads, size, latent = model.indexer_heads, model.indexer_head_size, model.query_latent_size
    assert heads is not None
    assert size is not None
    assert latent is not None
    return {
        **{"query_weight": (heads * size, latent), "key_weight": (size, model.hidden_size)},
        **{"norm_weight": (size,), "norm_bias": (size,), "head_weight": (heads, model.hidden_size)},
    }


def count_stage_layers(num_layers: int, pp_size: int) -> list[int]:
    """Layers of each pipeline stage. Where not all can have as many, some have one more: those between first, the last
    of them first, then the last stage, whose output layer is work too, and the first, which holds most microbatches.
    """
    least, extra = divmod(num_layers, pp_size)
    order = [*range(pp_size - 2, 0, -1), pp_size - 1, 0]
    larger = order[:extra]
    return [least + (pp_rank in larger) for pp_rank in range(pp_size)]


def list_stages(model: ModelConfig, pp_size: int) -> list[range]:
    """Layers of each pipeline stage, zero-based over the whole model: `count_stage_layers`, or with
    model.stages_begin_at_indexers as nearly so as can be. ValueError where too few layers have an indexer.
    """
    sizes = count_stage_layers(model.num_layers, pp_size)
    starts = [sum(sizes[:pp_rank]) for pp_rank in range(pp_size)]
    if model.stages_begin_at_indexers:
        starts = _move_starts(starts, list(filter(model.has_indexer, range(model.num_layers))))
    return [range(start, stop) for start, stop in pairwise([*starts, model.num_layers])]


def _move_starts(starts: Sequence[int], allowed: Sequence[int]) -> list[int]:
    """Each to the nearest layer that is allowed, and leaves as many for the others as these need."""
    require(
        len(starts) <= len(allowed),
        f"topology.pp_size={len(starts)} exceeds the {len(allowed)} layers with an indexer of their own, at which"
        f" model.stages_begin_at_indexers has stages begin; set topology.pp_size to {len(allowed)} or less",
    )
    places: list[int] = []
    for number, start in enumerate(starts):
        free = range(places[-1] + 1 if places else 0, len(allowed) - len(starts) + number + 1)
        places.append(min(free, key=lambda place: abs(allowed[place] - start)))
    return [allowed[place] for place in places]


def list_stage_layers(model: ModelConfig, pp_rank: int, pp_size: int) -> range:
    """Of a pipeline stage, zero-based over the whole model."""
    return list_stages(model, pp_size)[pp_rank]


def count_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the parameters among these tensors."""
    return sum(prod(shape) for name, shape in shapes.items() if not name.endswith(CHOICE_OFFSETS))


def compute_layer_shapes(model: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer by its name within the layer."""
    kind, h = model.architecture, model.hidden_size
    linears = _list_attention_linears(model, layer)
    for mlp, size in _list_mlps(model, layer):
        linears[f"{mlp}.linear_fc1"] = ((2 if kind.gated else 1) * size, h, kind.linear_biases)
        linears[f"{mlp}.linear_fc2"] = (h, size, kind.linear_biases)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("input_layernorm", "pre_mlp_layernorm") if kind.input_norms else ():
        shapes |= _norm(name, h, model)
    if model.has_experts(layer):
        linears["mlp.router"] = (model.num_experts or 0, h, kind.linear_biases)
        shapes |= {CHOICE_OFFSETS: (model.num_experts or 0,)} if kind.sigmoid_router else {}
    for name, (num_out, num_in, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        shapes |= {f"{name}.bias": (num_out,)} if has_bias else {}
    if kind.gated_shared_expert and model.has_experts(layer):
        shapes["mlp.shared_experts.gate.weight"] = (1, h)
    return shapes | _compute_attention_shapes(model, layer)


def _list_attention_linears(model: ModelConfig, layer: int) -> dict[str, tuple[int, int, bool]]:
    """Rows, columns and whether there is a bias, by Megatron's names."""
    kind, h = model.architecture, model.hidden_size
    if model.has_delta_net(layer):
        sizes = model.delta_sizes
        num_rows = sizes.key_heads * sum(sizes.projected_per_key.values())
        linears = {"linear_in": (num_rows, h, False), "linear_out": (h, sizes.value_dim, False)}
    else:
        linears = {"linear_proj": (h, model.context_size, kind.linear_biases)}
        if kind.latent_attention:
            linears |= {name: (*sizes, False) for name, sizes in _list_latent_linears(model).items()}
        else:
            num_rows = model.projected_query_size + 2 * model.kv_size
            linears["linear_qkv"] = (num_rows, h, kind.linear_biases or kind.qkv_biases)
    return {f"self_attention.{name}": sizes for name, sizes in linears.items()}


def _compute_attention_shapes(model: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Of attention, or what stands in its place, all that is in no linear."""
    kind = model.architecture
    if model.has_delta_net(layer):
        return {f"self_attention.core_attention.{name}": shape for name, shape in _compute_delta_shapes(model).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"self_attention.core_attention.sinks": (model.num_heads,)} if kind.attention_sinks else {}
    for name, size in _list_inner_norms(model).items():
        shapes |= _norm(name, size, model)
    return shapes


def _list_inner_norms(model: ModelConfig) -> dict[str, int]:
    """Features of each norm of a layer but of those before attention and MLP."""
    kind, h, norms = model.architecture, model.hidden_size, dict[str, int]()
    if kind.output_norms:
        norms |= {"self_attention.output_layernorm": h, "mlp.output_layernorm": h}
    if model.has_qk_norm:
        norms |= {"self_attention.q_layernorm": model.head_dim, "self_attention.k_layernorm": model.head_dim}
    if kind.whole_qk_norm:
        norms |= {"self_attention.layernorm_q": model.query_size, "self_attention.layernorm_k": model.kv_size}
    latents = {"q_latent_layernorm": model.query_latent_size, "kv_latent_layernorm": model.kv_latent_size}
    return norms | {f"self_attention.{name}": size for name, size in latents.items() if size is not None}


def _compute_delta_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    sizes = model.delta_sizes
    return {
        "kernels": (sizes.key_heads * sizes.convolved_per_key, sizes.kernel_size),
        "decay_logs": (sizes.value_heads,),
        "step_offsets": (sizes.value_heads,),
        "norm_factors": (sizes.value_size,),
    }


def _list_latent_linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linears that make queries, keys and values, by Megatron's names of them."""
    h, q, kv = model.hidden_size, model.query_latent_size, model.kv_latent_size
    assert kv is not None
    queries = {"linear_q_proj": (model.query_size, h)}
    if q is not None:
        queries = {"linear_q_down_proj": (q, h), "linear_q_up_proj": (model.query_size, q)}
    unturned_size = model.query_size - model.num_heads * model.rotary_size
    return {
        **queries,
        "linear_kv_down_proj": (kv + model.rotary_size, h),
        "linear_kv_up_proj": (unturned_size + model.context_size, kv),
    }


def _list_mlps(model: ModelConfig, layer: int) -> list[tuple[str, int]]:
    """The layer's MLP, or each of its experts and the one that every token passes; with the features inside."""
    size = model.find_mlp_size(layer)
    if not model.has_experts(layer):
        return [("mlp", size)]
    experts = [(f"mlp.experts.{expert}", size) for expert in range(model.num_experts or 0)]
    return experts if model.shared_ffn_size is None else [*experts, ("mlp.shared_experts", model.shared_ffn_size)]


def _norm(name: str, size: int, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight",) if model.architecture.rms_norm else ("weight", "bias")
    return {f"{name}.{kind}": (size,) for kind in kinds}
