"""What can be computed of rows that are split over context-parallel processes; standard library only."""

from lora_dist.model_config import ModelConfig
from lora_dist.refusals import require
from lora_dist.topology_config import TopologyConfig


def check_row_length(topology: TopologyConfig, seq_len: int, most: int) -> None:
    """ValueError where rows cannot be cut over the processes; the remedy is no longer than `most` positions."""
    multiple = topology.row_multiple
    longer = -(-seq_len // multiple) * multiple
    remedy = longer if longer <= most else seq_len // multiple * multiple
    cuts = [f"topology.cp_size={topology.cp_size}"] if topology.cp_size > 1 else []
    cuts += [f"sequence parallelism over tp {topology.tp_size}"] if topology.sequence_parallel else []
    require(
        seq_len % multiple == 0,
        f"data.seq_len={seq_len} cannot be cut into the equal parts of {' and '.join(cuts)}: it is no multiple of"
        f" {multiple}; set it to {remedy}",
    )


def check_context_parallel(
    model: ModelConfig, topology: TopologyConfig, *, seq_len: int, packed_attention: str, cuda_graphs: bool
) -> None:
    """ValueError for a run that needs of the row what cp_size > 1 does not bring to its processes."""
    prefix = "topology.cp_size>1 splits rows over processes"
    remedy = "use topology.cp_size=1"
    heads = (model.delta_key_heads or 0) // topology.tp_size
    require(
        heads % topology.cp_size == 0,
        f"{prefix}, which share out the heads of a gated DeltaNet; topology.cp_size={topology.cp_size} does not divide"
        f" its {heads} key heads on a rank of tp {topology.tp_size}; choose a divisor, or a smaller tp_size",
    )
    require(
        not model.selects(seq_len),
        f"{prefix}, and the indexers of model.family={model.family} pick among whole ones in rows of data.seq_len="
        f"{seq_len}; {remedy}, or a seq_len of at most {model.attended_positions}",
    )
    require(
        model.attention_dropout == 0.0,
        f"{prefix}, whose attention has no dropout, got model.attention_dropout={model.attention_dropout}; set it to 0"
        f" or {remedy}",
    )
    require(
        packed_attention != "mask",
        f"{prefix}, where packed examples attend block by block; use packed_attention=blocks or auto",
    )
    require(not cuda_graphs, f"cuda_graphs=true is not there for topology.cp_size>1; {remedy}, or leave it out")


def refuse_context_parallel(topology: TopologyConfig, verb: str) -> None:
    """ValueError where rows are split in a job that has no use for it."""
    require(
        topology.cp_size == 1,
        f"topology.cp_size={topology.cp_size} splits the rows of training, and {verb}; use topology.cp_size=1",
    )
