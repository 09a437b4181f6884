"""Rows longer than what an indexer picks: what a model and its pipeline stages must be like; standard library only."""

from lora_dist.base_shapes import list_stages
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
    starts = [layers.start for layers in list_stages(model, pp_size)]
    borrowing = next((start for start in starts if not model.has_indexer(start)), None)
    require(
        borrowing is None,
        f"topology.pp_size={pp_size}: {beyond} the stage that begins with layer {borrowing} attends to what an indexer"
        " of the stage before picks (model.layers_without_indexer); set model.stages_begin_at_indexers=true",
    )
