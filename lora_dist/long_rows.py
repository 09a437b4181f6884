"""Rows longer than what an indexer picks: what a model and its pipeline stages must be like; standard library only."""

from lora_dist.base_shapes import list_stage_layers
from lora_dist.model_config import ModelConfig
from lora_dist.refusals import require


def check_long_rows(model: ModelConfig, *, num_positions: int, pp_size: int) -> None:
    """ValueError, with the remedy, where rows of `num_positions` need indexers and cannot have them."""
    if not model.selects(num_positions):
        return
    beyond = f"rows of {num_positions} positions exceed model.attended_positions={model.attended_positions}, and"
    require(
        model.attention_dropout == 0,
        f"model.attention_dropout={model.attention_dropout}: {beyond} what an indexer picks is attended to without"
        " dropout; set it to 0",
    )
    first = find_split_sharing(model, pp_size)
    if first is None:
        return
    sizes = [size for size in range(1, model.num_layers + 1) if find_split_sharing(model, size) is None]
    raise ValueError(
        f"topology.pp_size={pp_size}: {beyond} the stage that begins with layer {first} attends to what an indexer of"
        f" the stage before picks (model.layers_without_indexer); set topology.pp_size to"
        f" {' or '.join(map(str, sizes))}, or shorten the rows to {model.attended_positions}"
    )


def find_split_sharing(model: ModelConfig, pp_size: int) -> int | None:
    """The first layer of the first stage whose indexer would be on the stage before; None where there is none."""
    starts = [list_stage_layers(model, pp_rank, pp_size).start for pp_rank in range(pp_size)]
    return next((start for start in starts if start in model.layers_without_indexer), None)
