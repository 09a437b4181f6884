"""Which pipeline stages of a job are alike, so that executing one of them tells of all; pure."""

from collections import defaultdict
from collections.abc import Hashable

from lora_dist.base_shapes import list_stage_layers
from lora_dist.config import LORA_METHODS, RunConfig
from lora_dist.lora.targets import build_adapter_specs


def group_stages(config: RunConfig, *, with_first: bool = False) -> list[tuple[int, ...]]:
    """pp_ranks of each kind, in order; the first of them holds the most microbatches.

    Alike are stages between the first and the last one whose layers have the same parts and adapters. `with_first`
    takes the first one for one of them, though it has the embedding as well.
    """
    pp_size = config.topology.pp_size
    layers = _describe_layers(config)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for pp_rank in range(pp_size):
        place = "last" if pp_rank == pp_size - 1 else "first" if pp_rank == 0 and not with_first else "middle"
        own = list_stage_layers(config.model, pp_rank, pp_size)
        groups[place, layers[own.start : own.stop]].append(pp_rank)
    return sorted(map(tuple, groups.values()))


def _describe_layers(config: RunConfig) -> tuple[Hashable, ...]:
    """Of each layer what may differ from others."""
    model, adapters = config.model, defaultdict(list)
    for spec in build_adapter_specs(config.lora, model) if config.method in LORA_METHODS else []:
        adapters[spec.layer].append((spec.target, spec.lora_rank))
    return tuple(
        (
            tuple(adapters[layer]),
            *(describe(layer) for describe in (model.sees_window, model.turns, model.has_delta_net, model.has_experts)),
            model.selects(config.data.seq_len) and model.has_indexer(layer),
        )
        for layer in range(model.num_layers)
    )
