"""FLOPs of one step: counted on the real operations, and the closed formula they must equal.

Conventions: a multiply-add is 2; only matrix products and attention count; attention is counted in full, not halved for
causality, as torch and NVIDIA do. Shapes: T tokens of a step with padding, M target tokens, S positions of what attends
within itself (a row, or an example of a packed one), Q features of all query heads.

For one linear from `i` to `o` features with adapters of total rank `r`:

| what               | frozen | frozen + LoRA        | trained |
| forward            | 2 i o  | 2 i o + 2 r (i + o)  | 2 i o   |
| d(input)           | 2 i o  | 2 i o + 2 r i        | 2 i o   |
| other gradients    | -      | 2 r (i + o) + 2 r o  | 2 i o   |

times T: a frozen linear costs 4 i o a token where a trained one costs 6 i o. An expert's linears see K T rows in all,
where K of them serve each token, the router is one more linear without adapters, and what serves all tokens beside the
experts stands apart: its input gradient does not hang on theirs. Nor do a latent's of keys and values on the queries',
but the latents enter the heads as one. The output layer is another over M
tokens, attention 4 S Q a token forward and 10 S Q backward (the kernel computes the scores again). A gated delta rule's
products within chunks and with the states between them are one forward, and three backward, which begins with another
forward; what solves its triangular systems does not count, the product in their gradient does. Below the lowest adapted
linear there is no backward at all, and it needs no d(input) itself. Recomputed regions add their forward. An
indexer's linears and scores are forward alone, and run again in a recomputed layer unless others share its choice.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lora_dist.config import ModelConfig
from lora_dist.delta_sizes import DeltaSizes
from lora_dist.lora.spec import CANONICAL_TARGETS, AdapterSpec

_LINEAR_OF_TARGET = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    **{"q_a_proj": "q_down", "q_b_proj": "q_up", "kv_a_proj": "kv_down", "kv_b_proj": "kv_up"},
    "o_proj": "proj",
    **{target: "delta_in" for target in CANONICAL_TARGETS if target.startswith("in_proj_")},
    "out_proj": "delta_out",
    "gate_proj": "fc1",
    "up_proj": "fc1",
    "down_proj": "fc2",
    "shared_gate_proj": "shared_fc1",
    "shared_up_proj": "shared_fc1",
    "shared_down_proj": "shared_fc2",
}
_MLP = ("router", "fc1", "fc2", "shared_gate", "shared_fc1", "shared_fc2")
_LENDING = "lending indexer"
"""Whose layer does not pick again when it is recomputed."""
_Steps = tuple[tuple[tuple[str, ...], ...], ...]
"""A layer's parts, those that there are, in forward order: chains side by side start from the same, a step's from all
that those of the one before end in."""
_FUSED: _Steps = ((("qkv", "delta_in"),),)
_FROM_LATENTS: _Steps = ((("q_down",), ("kv_down",)), (("q_up",), ("kv_up",), ("indexer", _LENDING)))
_QUERIES_BESIDE: _Steps = ((("qkv",), ("kv_down", "kv_up")),)
_REST: _Steps = (
    (("attention", "proj", "delta", "delta_out"),),
    (("router", "fc1", "fc2"), ("shared_gate",), ("shared_fc1", "shared_fc2")),
)


def _count_addmm_(accumulated: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _count_grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Each row, or each column, meets the matrix of its own group alone."""
    return int(2 * left[-2] * left[-1] * right[-1])


def _count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, _write_out(key, query), _write_out(value, query)))


def _count_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, _write_out(key, query), _write_out(value, query)))


def _write_out(key: Any, query: Any) -> tuple[int, ...]:
    """The shape [B, heads, S, D] with each of the query's heads: the counter of torch 2.11 knows no shared ones."""
    return (key[0], query[1], *key[2:])


_aten = torch.ops.aten
_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_MISSING_IN_TORCH = {
    _aten.addmm_: _count_addmm_,
    _aten._grouped_mm: _count_grouped,
    **{getattr(_aten, f"_scaled_dot_product_{kernel}"): _count_attention for kernel in _ATTENTION},
    **{getattr(_aten, f"_scaled_dot_product_{kernel}_backward"): _count_attention_backward for kernel in _ATTENTION},
}


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count what this process computes within: `.get_total_flops()`. Slows down what it watches."""
    with FlopCounterMode(display=False, custom_mapping=_MISSING_IN_TORCH) as counter:
        yield counter


def build_flop_formulas() -> dict[Any, Callable[..., int]]:
    """What `count_flops` adds up, by operator: called with the operator's arguments and `out_val`, its result."""
    return FlopCounterMode(display=False, custom_mapping=_MISSING_IN_TORCH).flop_registry


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What of a step the FLOPs depend on."""

    num_tokens: int
    """T: positions of the global batch, padding included."""
    num_loss_tokens: int
    """M: target tokens, the only ones the output layer sees."""
    num_scores: int
    """That a head computes: the squares of the blocks that attend within themselves, T S where those are whole rows."""
    num_vocab_rows: int
    """Rows of the embedding with the padding that tensor parallelism adds."""
    num_windowed_scores: int | None = None
    """Where a layer sees a sliding window: T K where rows are cut into tiles whose queries see K keys; None is as
    many."""
    num_picking: int = 0
    """Positions for which indexers pick, where there are some: those of blocks longer than what they pick."""
    num_picking_scores: int = 0
    """That one head of an indexer computes for them."""
    chunk_size: int = 0
    """Positions of a chunk in gated DeltaNets, where there are some."""
    num_chunks: int = 0
    """That the blocks are cut into there, the last of each filled up."""
    num_first_chunks: int = 0
    """Of them those that a block begins with."""
    recompute: str = "none"
    input_grad: bool = False
    """True where a pipeline asks the first layer for d(input) though nothing below it trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One linear (or the attention core, or what a gated DeltaNet has in its place) of one layer."""

    name: str
    forward: int
    input_grad: int
    other_grads: int
    trains: bool = field(default=False)


def compute_lora_flops(model: ModelConfig, specs: Sequence[AdapterSpec], shape: StepShape) -> int:
    """FLOPs of one LoRA step of the whole model on one process; TP divides all but a router's, A's replicas and,
    without sequence parallelism, what makes latents.
    """
    ranks: Counter[tuple[int, str]] = Counter()
    for spec in specs:
        ranks[spec.layer, _LINEAR_OF_TARGET[spec.target]] += spec.lora_rank
    layers = [
        _build_layer(model, layer, shape, {n: ranks[layer, n] for n in _LINEAR_OF_TARGET.values()}, full=False)
        for layer in range(model.num_layers)
    ]
    head = 2 * shape.num_loss_tokens * model.hidden_size * shape.num_vocab_rows
    return 2 * head + _sum_layers(layers, _list_steps(model), shape, full=False)


def compute_full_flops(model: ModelConfig, shape: StepShape) -> int:
    """FLOPs of one step of full fine-tuning of the whole model."""
    layers = [_build_layer(model, layer, shape, {}, full=True) for layer in range(model.num_layers)]
    head = 2 * shape.num_loss_tokens * model.hidden_size * shape.num_vocab_rows
    return 3 * head + _sum_layers(layers, _list_steps(model), shape, full=True)


def _list_features(model: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Into and out of each linear of a layer; of one expert's."""
    h, f = model.hidden_size, model.find_mlp_size(layer)
    if model.has_delta_net(layer):
        sizes = model.delta_sizes
        num_projected = sizes.key_heads * sum(sizes.projected_per_key.values())
        features = {"delta_in": (h, num_projected), "delta_out": (sizes.value_dim, h)}
    else:
        features = {**_list_projections(model), "proj": (model.context_size, h)}
    features |= {"fc1": (h, 2 * f if model.architecture.gated else f), "fc2": (f, h)}
    if model.has_experts(layer):
        features["router"] = (h, model.num_experts or 0)
        if (shared := model.shared_ffn_size) is not None:
            features |= {"shared_fc1": (h, 2 * shared), "shared_fc2": (shared, h)}
            features |= {"shared_gate": (h, 1)} if model.architecture.gated_shared_expert else {}
    return features


def _list_steps(model: ModelConfig) -> _Steps:
    if not model.architecture.latent_attention:
        return _FUSED + _REST
    return (_QUERIES_BESIDE if model.query_latent_size is None else _FROM_LATENTS) + _REST


def _list_projections(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Those that queries, keys and values come from; of queries without a latent `qkv`."""
    h, q = model.hidden_size, model.query_size
    if model.kv_latent_size is None:
        return {"qkv": (h, model.projected_query_size + 2 * model.kv_size)}
    latent, turned = model.query_latent_size, model.rotary_size
    queries = {"qkv": (h, q)} if latent is None else {"q_down": (h, latent), "q_up": (latent, q)}
    unturned = q - model.num_heads * turned
    keys_and_values = {"kv_up": (model.kv_latent_size, unturned + model.context_size)}
    return {**queries, "kv_down": (h, model.kv_latent_size + turned), **keys_and_values}


def _build_layer(
    model: ModelConfig, layer: int, shape: StepShape, ranks: dict[str, int], *, full: bool
) -> dict[str, _Part]:
    tokens, features = shape.num_tokens, _list_features(model, layer)
    mlp_tokens = tokens * (model.experts_per_token or 1) if model.has_experts(layer) else tokens
    parts = {core.name: core for core in [_build_core(model, layer, shape), *_build_indexer(model, layer, shape)]}
    for name, (i, o) in features.items():
        rows, r = mlp_tokens if name in ("fc1", "fc2") else tokens, ranks.get(name, 0)
        base, down, up = 2 * i * o * rows, 2 * r * i * rows, 2 * r * o * rows
        parts[name] = _Part(
            name=name,
            forward=base + down + up,
            input_grad=base + down,
            other_grads=base if full else down + 2 * up,
            trains=full or r > 0,
        )
    return parts


def _build_core(model: ModelConfig, layer: int, shape: StepShape) -> _Part:
    if model.has_delta_net(layer):
        forward, solving = _count_delta_rule(model.delta_sizes, shape)
        return _Part(name="delta", forward=forward, input_grad=3 * forward + solving, other_grads=0)
    num_scores = shape.num_scores
    if shape.num_windowed_scores is not None and model.sees_window(layer):
        num_scores = shape.num_windowed_scores
    score_flops = 2 * num_scores * model.query_size  # of values too, which are padded where they have fewer
    return _Part(name="attention", forward=2 * score_flops, input_grad=5 * score_flops, other_grads=0)


def _build_indexer(model: ModelConfig, layer: int, shape: StepShape) -> list[_Part]:
    """None where rows are too short or the layer shares an earlier one's."""
    if not shape.num_picking or not model.has_indexer(layer):
        return []
    heads, size, latent = model.indexer_heads or 0, model.indexer_head_size or 0, model.query_latent_size or 0
    keys_and_weights = shape.num_tokens * model.hidden_size * (size + heads)
    queries = shape.num_picking * latent * heads * size
    scores = shape.num_picking_scores * heads * (size + 1)
    name = _LENDING if layer + 1 in model.layers_without_indexer else "indexer"
    return [_Part(name=name, forward=2 * (keys_and_weights + queries + scores), input_grad=0, other_grads=0)]


def _count_delta_rule(sizes: DeltaSizes, shape: StepShape) -> tuple[int, int]:
    """Forward: within each chunk, and between it and the state before it, which a block's first one has not; and what
    the gradients of the triangular systems take.
    """
    area, heads = shape.chunk_size**2, sizes.value_heads
    within = area * (2 * sizes.key_heads * sizes.key_size + heads * sizes.value_size)
    between = 3 * shape.chunk_size * heads * sizes.key_size * sizes.value_size
    forward = 2 * (shape.num_chunks * within + (shape.num_chunks - shape.num_first_chunks) * between)
    return forward, 2 * shape.num_chunks * area * heads * (sizes.key_size + sizes.value_size)


def _sum_layers(layers: Sequence[dict[str, _Part]], steps: _Steps, shape: StepShape, *, full: bool) -> int:
    total, needs_input_grad = 0, full or shape.input_grad
    for layer in layers:
        recomputes = _list_recomputed(layer, shape.recompute, needs_input_grad)
        for step in steps:
            chains = [[layer[name] for name in chain if name in layer] for chain in step]
            sums = [_sum_chain(chain, recomputes, needs_input_grad) for chain in chains]
            total += sum(flops for flops, _ in sums)
            needs_input_grad = any(needed for _, needed in sums)
    return total


def _sum_chain(chain: Sequence[_Part], recomputes: Collection[str], needs_input_grad: bool) -> tuple[int, bool]:
    """And whether what comes after it needs d(input)."""
    total = 0
    for part in chain:
        # A recomputed region's input is made to require grad, whatever lies below it.
        needs_input_grad = needs_input_grad or part.name in recomputes
        total += part.forward * (2 if part.name in recomputes else 1)
        total += part.other_grads + (part.input_grad if needs_input_grad else 0)
        needs_input_grad = needs_input_grad or part.trains
    return total, needs_input_grad


def _list_recomputed(layer: dict[str, _Part], recompute: str, input_requires_grad: bool) -> set[str]:
    """Names of the layer's parts that run twice."""
    if recompute == "none" or not (input_requires_grad or any(part.trains for part in layer.values())):
        return set()
    return set(layer) - {_LENDING} if recompute == "full" else set(_MLP)
