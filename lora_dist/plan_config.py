"""What `lora-dist plan` is asked, and the hardware that it predicts for; standard library only."""

from dataclasses import dataclass, field

from lora_dist.refusals import require, require_one_of

RECOMPUTE = ("none", "selective", "full", "auto")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """One kind of processor and how many of them are joined, for `lora-dist plan`. Per GPU, in the maker's units."""

    name: str
    kind: str
    """gpu or cpu: which attention kernel runs and how memory is handed out."""
    memory_gib: float
    """What a process can allocate on an empty device."""
    reserved_gib: float
    """Taken before the first tensor: CUDA context, NCCL's channels, cuBLAS's workspace."""
    peak_tflops: dict[str, float]
    """Dense matrix products, by dtype; a dtype that is not named cannot run there."""
    achievable_fraction: float
    """Of the peak, by large matrix products."""
    memory_gb_s: float
    memory_fraction: float
    """Of the memory's bandwidth, by a copy."""
    gpus_per_node: int
    link_gb_s: float
    """Between GPUs of a node, one direction, as a large all-reduce gets it."""
    network_gb_s: float
    """Between nodes, one GPU's share, one direction."""
    link_latency_us: float
    network_latency_us: float
    launch_us: float
    """Shortest time of one kernel, however small."""
    compute_capability: float = 0.0
    """8.0 and above have flash attention; 0 where kind is cpu."""

    def __post_init__(self) -> None:
        require_one_of("hardware.kind", self.kind, ("gpu", "cpu"))
        for key in ("memory_gib", "memory_gb_s", "link_gb_s", "network_gb_s"):
            require(getattr(self, key) > 0, f"hardware.{key}={getattr(self, key)} must be positive")
        for key in ("reserved_gib", "link_latency_us", "network_latency_us", "launch_us", "compute_capability"):
            require(getattr(self, key) >= 0, f"hardware.{key}={getattr(self, key)} must not be negative")
        for key in ("achievable_fraction", "memory_fraction"):
            require(0 < getattr(self, key) <= 1, f"hardware.{key}={getattr(self, key)} must lie in (0, 1]")
        require(self.gpus_per_node >= 1, f"hardware.gpus_per_node={self.gpus_per_node} must be at least 1")

    @property
    def available_gib(self) -> float:
        """For tensors."""
        return self.memory_gib - self.reserved_gib


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `lora-dist plan` works out."""

    search: bool = False
    """Look for the topologies that fit instead of planning the one of `topology`."""
    num_gpus: int | None = None
    """GPUs to plan for; null takes tp_size x cp_size x pp_size x dp_size."""
    recompute: list[str] = field(default_factory=lambda: ["none", "full"])
    """Values of loop.recompute to show side by side, beside the job's own where that is selective or full."""
    target_fraction: float = 1.0
    """Share of the tokens that are target tokens: what the output layer has to see. 1 is the most it can be."""
    num_processes: int = 2
    """Local processes that work on the plan at once."""
    file: str | None = None
    """plan.json of this job, from an earlier `lora-dist plan`: the pre-flight check holds free memory against it."""

    def __post_init__(self) -> None:
        require(self.num_gpus is None or self.num_gpus >= 1, f"plan.num_gpus={self.num_gpus} must be at least 1")
        require(self.num_processes >= 1, f"plan.num_processes={self.num_processes} must be at least 1")
        require(bool(self.recompute), "plan.recompute is empty; name at least one, e.g. [none,full]")
        for recompute in self.recompute:
            require_one_of("plan.recompute", recompute, RECOMPUTE)
        require(0.0 < self.target_fraction <= 1.0, f"plan.target_fraction={self.target_fraction} must lie in (0, 1]")
