"""Which linears get adapters: canonical names, aliases and regular expressions resolved to specs."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.spec import CANONICAL_TARGETS, AdapterSpec

_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
_ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "wq", "linear_q", "linear_q_proj", "query"), ("q_proj",)),
    **dict.fromkeys(("k", "wk", "linear_k", "key"), ("k_proj",)),
    **dict.fromkeys(("v", "wv", "linear_v", "value"), ("v_proj",)),
    **dict.fromkeys(("kv_a_proj_with_mqa", "linear_kv_down_proj"), ("kv_a_proj",)),
    **{"linear_q_down_proj": ("q_a_proj",), "linear_q_up_proj": ("q_b_proj",), "linear_kv_up_proj": ("kv_b_proj",)},
    **dict.fromkeys(("o", "wo", "linear_o", "out_proj", "linear_proj", "attn.c_proj", "dense"), ("o_proj",)),
    **dict.fromkeys(("c_attn", "attn.c_attn", "qkv", "qkv_proj", "linear_qkv", "query_key_value"), _ATTENTION_INPUTS),
    **dict.fromkeys(("gate", "w1"), ("gate_proj",)),
    **dict.fromkeys(("c_fc", "mlp.c_fc", "fc1", "w3", "dense_h_to_4h"), ("up_proj",)),
    **dict.fromkeys(("linear_fc1", "gate_up_proj"), ("gate_proj", "up_proj")),
    **dict.fromkeys(("mlp.c_proj", "fc2", "w2", "linear_fc2", "dense_4h_to_h"), ("down_proj",)),
    "c_proj": ("o_proj", "down_proj"),
    **{
        f"{shared}.{name}": (f"shared_{name}",)
        for shared in ("shared_expert", "shared_experts")
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
    "linear_attn.out_proj": ("out_proj",),
    **dict.fromkeys(("all-linear", "all"), CANONICAL_TARGETS),
}
_ALL = ("all-linear", "all")
"""Where a layer has experts, the linears that every token passes: adapters on all experts would be many times more."""
_DELTA_INPUTS = [target for target in CANONICAL_TARGETS if target.startswith("in_proj_")]
_LINEARS = {
    **dict.fromkeys(_ATTENTION_INPUTS, "self_attention.linear_qkv"),
    "q_a_proj": "self_attention.linear_q_down_proj",
    "q_b_proj": "self_attention.linear_q_up_proj",
    "kv_a_proj": "self_attention.linear_kv_down_proj",
    "kv_b_proj": "self_attention.linear_kv_up_proj",
    "o_proj": "self_attention.linear_proj",
    **dict.fromkeys(_DELTA_INPUTS, "self_attention.linear_in"),
    "out_proj": "self_attention.linear_out",
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp.linear_fc1"),
    "down_proj": "mlp.linear_fc2",
    **dict.fromkeys(("shared_gate_proj", "shared_up_proj"), "mlp.shared_experts.linear_fc1"),
    "shared_down_proj": "mlp.shared_experts.linear_fc2",
}
DELTA_LINEARS = ("self_attention.linear_in", "self_attention.linear_out")
WHOLE_TARGETS = ("q_a_proj", "kv_a_proj")
"""Of linears that every TP rank holds whole."""
_Value = TypeVar("_Value")


def find_linear(target: str, model: ModelConfig) -> str:
    """Megatron's linear that holds a target, by its name within a layer."""
    if target == "q_proj" and model.architecture.latent_attention:
        return "self_attention.linear_q_proj"
    return _LINEARS[target]


def compute_linear_shapes(model: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each adaptable linear of a layer; of experts', which are alike, of one."""
    attention = _compute_delta_shapes(model) if model.has_delta_net(layer) else _compute_attention_shapes(model)
    h, shapes = model.hidden_size, attention | compute_mlp_shapes(model, layer)
    if model.has_experts(layer) and (f := model.shared_ffn_size) is not None:
        shapes |= {"shared_gate_proj": (h, f), "shared_up_proj": (h, f), "shared_down_proj": (f, h)}
    return shapes


def _compute_attention_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    h, q, kv = model.hidden_size, model.query_size, model.kv_size
    output = {"o_proj": (model.context_size, h)}
    if not model.architecture.latent_attention:
        return {"q_proj": (h, model.projected_query_size), "k_proj": (h, kv), "v_proj": (h, kv), **output}
    q_latent, kv_latent, turned = model.query_latent_size, model.kv_latent_size, model.rotary_size
    assert kv_latent is not None
    queries = {"q_proj": (h, q)} if q_latent is None else {"q_a_proj": (h, q_latent), "q_b_proj": (q_latent, q)}
    heads = (kv_latent, q - model.num_heads * turned + model.context_size)
    return {**queries, "kv_a_proj": (h, kv_latent + turned), "kv_b_proj": heads, **output}


def _compute_delta_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    h, sizes = model.hidden_size, model.delta_sizes
    inputs = {target: (h, sizes.key_heads * size) for target, size in sizes.projected_per_key.items()}
    return {**inputs, "out_proj": (sizes.value_dim, h)}


def compute_mlp_shapes(model: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each linear of a layer's MLP, or of each of its experts."""
    h, f = model.hidden_size, model.find_mlp_size(layer)
    gate = {"gate_proj": (h, f)} if model.architecture.gated else {}
    return {**gate, "up_proj": (h, f), "down_proj": (f, h)}


def find_num_experts(target: str, model: ModelConfig, layer: int) -> int | None:
    """How many experts of a layer have a linear of that name; None where every token passes the one there is."""
    return model.num_experts if model.has_experts(layer) and target in compute_mlp_shapes(model, layer) else None


def build_adapter_specs(lora: LoraConfig, model: ModelConfig) -> list[AdapterSpec]:
    """Every adapter the configuration asks for, ordered by layer and target.

    ValueError for a pattern that matches nothing (with what exists) or a layer the model has not.
    """
    shapes = [compute_linear_shapes(model, layer) for layer in range(model.num_layers)]
    layers = parse_layers("lora.layers", lora.layers, model.num_layers)
    sites = [(layer, target) for layer, own in enumerate(shapes) for target in own]
    _check_router(lora, model)
    chosen: set[tuple[int, str]] = set()
    for pattern in lora.target_modules:
        meant = sites
        if pattern.lower() in _ALL:
            meant = [(layer, target) for layer, target in sites if find_num_experts(target, model, layer) is None]
        chosen.update(_match("lora.target_modules", pattern, meant))
    adapted = [site for site in sites if site in chosen and site[0] in layers]
    if not adapted:
        raise ValueError(f"lora.layers={lora.layers} leaves none of lora.target_modules={lora.target_modules}")
    lora_ranks = _resolve_pattern("lora.rank_pattern", lora.rank_pattern, adapted)
    alphas = _resolve_pattern("lora.alpha_pattern", lora.alpha_pattern, adapted)
    specs = [
        AdapterSpec(
            layer=layer,
            target=target,
            lora_rank=lora_ranks.get((layer, target), lora.rank),
            alpha=alphas.get((layer, target), lora.alpha),
            in_features=shapes[layer][target][0],
            out_features=shapes[layer][target][1],
            dropout=lora.dropout,
            rank_stabilized=lora.use_rslora,
            use_dora=lora.use_dora,
            num_experts=find_num_experts(target, model, layer),
        )
        for layer, target in adapted
    ]
    _check_experts(specs, lora)
    _check_dora(specs, lora, model)
    if lora.init == "pissa":
        _check_has_principal_parts(specs)
    return specs


def _check_router(lora: LoraConfig, model: ModelConfig) -> None:
    """`gate` is an alias of gate_proj where a layer has no router."""
    for key in ("target_modules", "rank_pattern", "alpha_pattern") if model.architecture.experts else ():
        for pattern in getattr(lora, key):
            if pattern.rpartition(".")[2] in ("gate", "router"):
                raise ValueError(
                    f"lora.{key}: {pattern!r} is the router of {model.family}, which takes no adapter; the linears of"
                    " its experts are gate_proj, up_proj and down_proj"
                )


def _check_experts(specs: Iterable[AdapterSpec], lora: LoraConfig) -> None:
    name = next((spec.name for spec in specs if spec.num_experts is not None), None)
    for key, value, plain in (
        ("lora.dropout", lora.dropout, 0.0),
        ("lora.use_dora", lora.use_dora, False),
        ("lora.init", lora.init, "gaussian"),
    ):
        if name is not None and value != plain:
            raise ValueError(
                f"{key}={value}: {name} is a linear of experts, whose adapters want {key}={plain}; or leave the"
                " experts' linears out of lora.target_modules"
            )


def is_mlp_beside_experts(spec: AdapterSpec, model: ModelConfig) -> bool:
    """Whether the linear is of a dense or shared MLP in a model of experts, whose linears have the same names."""
    return model.architecture.experts and spec.num_experts is None and _LINEARS[spec.target].startswith("mlp.")


def _check_dora(specs: Iterable[AdapterSpec], lora: LoraConfig, model: ModelConfig) -> None:
    name = next((spec.name for spec in specs if is_mlp_beside_experts(spec, model)), None)
    if lora.use_dora and name is not None:
        raise ValueError(
            f"lora.use_dora=true: {name} has to be a parameter to PEFT, which has no DoRA on parameters; leave the"
            " MLPs' linears out of lora.target_modules"
        )


def _check_has_principal_parts(specs: Iterable[AdapterSpec]) -> None:
    for spec in specs:
        most = min(spec.in_features, spec.out_features)
        if spec.lora_rank > most:
            raise ValueError(
                f"lora.init=pissa: {spec.name} is {spec.out_features} x {spec.in_features}, so it has no rank"
                f" {spec.lora_rank} to start with; use at most {most}"
            )


def find_targets(name: str) -> tuple[str, ...]:
    """Canonical targets of a linear by an alias or its canonical name; () for any other.

    `out_proj` alone is what most models call o_proj.
    """
    found = _ALIASES.get(name, _ALIASES.get(name.lower(), ()))
    return (name,) if not found and name in CANONICAL_TARGETS else found


def _match(key: str, pattern: str, sites: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Sites that a canonical name, an alias or a regular expression over `layers.N.target` names."""
    sites = list(sites)
    is_target = any(target == pattern for _, target in sites)
    named = (pattern,) if is_target else find_targets(pattern)
    if named:
        matched = [site for site in sites if site[1] in named]
    else:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is neither a known name nor a regular expression: {error}") from None
        matched = [(layer, target) for layer, target in sites if expression.fullmatch(f"layers.{layer}.{target}")]
    if not matched:
        existing = {target for _, target in sites}
        last_layer, (layer, target) = max(layer for layer, _ in sites), sites[0]
        wants_inputs = key == "lora.target_modules" and not set(_ATTENTION_INPUTS).isdisjoint(named)
        raise ValueError(
            f"{key}: {pattern!r} matches nothing; there are {', '.join(sorted(existing))} in layers 0 to {last_layer}"
            f" (a regular expression must match all of e.g. 'layers.{layer}.{target}')"
            f"{_name_in_place(existing) if wants_inputs else ''}"
        )
    return matched


def _name_in_place(existing: set[str]) -> str:
    """What a latent attention has in the place of q, k and v; empty for any other, which has them."""
    if "kv_b_proj" not in existing:
        return ""
    queries = "q_b_proj" if "q_b_proj" in existing else "q_proj"
    return (
        f"; for q and v take [{queries},kv_b_proj], or [all] for every linear that all tokens pass, or leave LoRA out"
        " with method=, in compare and plan with compare.methods="
    )


def _resolve_pattern(
    key: str, patterns: Mapping[str, _Value], sites: list[tuple[int, str]]
) -> dict[tuple[int, str], _Value]:
    """Value of each site; a later pattern wins over an earlier one."""
    resolved: dict[tuple[int, str], _Value] = {}
    for pattern, value in patterns.items():
        resolved.update(dict.fromkeys(_match(key, pattern, sites), value))
    return resolved


def parse_layers(key: str, layers: list[str] | None, num_layers: int) -> set[int]:
    """`["0-11", "23"]` -> layers. ValueError for what is no layer of the model."""
    if layers is None:
        return set(range(num_layers))
    chosen: set[int] = set()
    for item in layers:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
        if not found:
            raise ValueError(f"{key}: {item!r} is neither a layer nor a range; write e.g. [0-11,23]")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise ValueError(f"{key}: {item} does not exist; the model has layers 0 to {num_layers - 1}")
        chosen.update(range(first, last + 1))
    return chosen
