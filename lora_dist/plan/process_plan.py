"""What one process of a job will hold, compute and send in a step; plain values."""

from dataclasses import dataclass

from lora_dist.measure.collectives import Collective


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlan:
    """One kind of process: a pipeline stage's, first TP rank, first replica. Bytes are of its device."""

    pp_rank: int
    pp_ranks: tuple[int, ...]
    """The stages that it stands for; it is the first of them, which holds the most microbatches."""
    stage: str
    """only, first, middle or last."""
    num_layers: int
    num_parameters: int
    """Of this process's shard, rows that pad the vocabulary included."""
    num_trainable: int
    ledger: dict[str, int]
    """Bytes of each kind at the moment of the step's peak; they add up to it."""
    peak_bytes: int
    """Largest sum within the step, or while the model and its optimizer are made."""
    setup_peak_bytes: int
    held_bytes: int
    """Between steps."""
    largest: dict[str, int]
    """Largest bytes of each kind, whenever in the step."""
    num_in_flight: int
    """Microbatches whose activations are held at once."""
    num_microbatches: int
    num_executed: int
    """Of them, those that were executed; the others repeat the last ones exactly."""
    flops: int
    """Of one step."""
    collectives: list[Collective]
    """Of one step, every call by operation, group and size."""
    compute_seconds: float
    communication_seconds: float
    microbatch_seconds: float
    """Of one microbatch's forward and backward when the pipeline is full, communication included."""

    @property
    def busy_seconds(self) -> float:
        """A step without waiting for other stages."""
        return self.compute_seconds + self.communication_seconds


def name_stage(pp_rank: int, pp_size: int) -> str:
    if pp_size == 1:
        return "only"
    return "first" if pp_rank == 0 else "last" if pp_rank == pp_size - 1 else "middle"
