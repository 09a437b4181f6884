"""How many processes share a model and what DeepSpeed partitions over its replicas; standard library only."""

from dataclasses import dataclass

from lora_dist.refusals import require, require_one_of


@dataclass(kw_only=True, slots=True)
class TopologyConfig:
    """How many processes share one model, and how many models there are."""

    tp_size: int = 1
    """Tensor-parallel processes: each weight matrix is split over them."""
    pp_size: int = 1
    """Pipeline stages. Where they cannot all have as many layers, some between the first and the last have one more."""
    cp_size: int = 1
    """Context-parallel processes: each has a part of every row, and no adapter communicates for it."""
    dp_size: int | None = None
    """Data-parallel replicas; null takes what the number of processes leaves (1 when started bare)."""
    sequence_parallel: bool = False
    """Split the activations between the tensor-parallel regions along the sequence."""
    timeout_s: float = 1800.0
    """A collective that waits longer than this is an error."""

    def __post_init__(self) -> None:
        for key in ("tp_size", "pp_size", "cp_size", "dp_size"):
            size = getattr(self, key)
            require(size is None or size >= 1, f"topology.{key}={size} must be at least 1")
        timeout_s = self.timeout_s
        require(0 < timeout_s < float("inf"), f"topology.timeout_s={timeout_s} must be positive and finite")

    @property
    def replica_size(self) -> int:
        """Processes of one replica."""
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def num_processes(self) -> int:
        """Of a job that nothing else says the number of."""
        return self.replica_size * (self.dp_size or 1)

    @property
    def row_multiple(self) -> int:
        """Rows have a multiple of so many positions, so that they can be cut: `row_shard.RowShard`, then over TP."""
        parts = 2 * self.cp_size if self.cp_size > 1 else 1
        return parts * (self.tp_size if self.sequence_parallel else 1)


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    """What DeepSpeed partitions over the data-parallel replicas."""

    stage: int = 1
    """0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory."""

    def __post_init__(self) -> None:
        require_one_of("zero.stage", self.stage, (0, 1, 2, 3))
        require(
            not (self.offload_optimizer and self.stage == 0),
            "zero.offload_optimizer=true needs zero.stage >= 1, got zero.stage=0",
        )


def compute_dp_size(topology: TopologyConfig, world_size: int, source: str = "the launcher started") -> int:
    """Data-parallel replicas on `world_size` processes; ValueError when the sizes do not multiply out."""
    dp_size = topology.dp_size or max(1, world_size // topology.replica_size)
    needed = topology.replica_size * dp_size
    context = f" x cp {topology.cp_size}" if topology.cp_size > 1 else ""
    require(
        needed == world_size,
        f"tp {topology.tp_size}{context} x pp {topology.pp_size} x dp {dp_size} = {needed} processes,"
        f" but {source} {world_size}; start {needed} or change the topology",
    )
    return dp_size
