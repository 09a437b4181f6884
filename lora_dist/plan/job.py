"""A whole job out of its kinds of process: memory, step time, throughput, files."""

import gc
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_dist.base_shapes import count_parameters
from lora_dist.config import LoopConfig, RunConfig, compute_num_microbatches
from lora_dist.files.peft_layout import compute_peft_shapes
from lora_dist.lora.pissa import double_ranks
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.methods.count import count_lora, count_trainable
from lora_dist.plan.execute import compute_world_size, execute_process, require_hardware
from lora_dist.plan.live_bytes import ADAPTERS, BASE, GRADIENTS, OPTIMIZER
from lora_dist.plan.process_plan import ProcessPlan
from lora_dist.plan.stages import group_stages
from lora_dist.plan_config import RECOMPUTE

GIB = 2**30
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """One method under one recomputation on one topology."""

    method: str
    recompute: str
    """As `LoopConfig.recomputation` tells it."""
    tp_size: int
    cp_size: int
    pp_size: int
    dp_size: int
    sequence_parallel: bool
    processes: list[ProcessPlan]
    """One of each kind, by pipeline stage."""
    reserved_bytes: int
    """CUDA context and libraries, on every GPU."""
    memory_bytes: int
    """Of one GPU."""
    tokens_per_step: int
    step_seconds: float
    num_trainable: int
    """Of the whole model, each parameter once."""
    checkpoint_bytes: dict[str, int]
    """Tensors of each file, headers left out."""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.pp_size * self.dp_size

    @property
    def heaviest(self) -> ProcessPlan:
        return max(self.processes, key=lambda process: process.peak_bytes)

    @property
    def needed_bytes(self) -> int:
        """Of the fullest GPU, with what is reserved."""
        return self.heaviest.peak_bytes + self.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes

    @property
    def tokens_per_sec_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def flops(self) -> int:
        """Of one step of the whole job."""
        return self.sum_over_job([process.flops for process in self.processes])

    @property
    def state_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer on all GPUs together."""
        kinds = (BASE, ADAPTERS, GRADIENTS, OPTIMIZER)
        return self.sum_over_job([sum(process.largest[kind] for kind in kinds) for process in self.processes])

    def sum_over_job(self, values: Sequence[int]) -> int:
        """`values[i]` is one process's of kind i."""
        kinds = zip(self.processes, values, strict=True)
        per_stage = self.world_size // self.pp_size
        return per_stage * sum(len(process.pp_ranks) * value for process, value in kinds)

    def describe(self) -> dict[str, Any]:
        """For plan.json."""
        derived = ("world_size", "needed_bytes", "fits", "tokens_per_sec_per_gpu", "flops", "state_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def plan_jobs(configs: Sequence[RunConfig]) -> list[JobPlan]:
    """Execute every kind of process of each job, `plan.num_processes` at a time."""
    jobs = [(config, group_stages(config)) for config in configs]
    tasks = [(config, compute_world_size(config), alike[0]) for config, kinds in jobs for alike in kinds]
    executed = iter(execute_all(tasks, configs[0].plan.num_processes))
    return [
        build_job_plan(config, [replace(next(executed), pp_ranks=alike) for alike in kinds]) for config, kinds in jobs
    ]


def execute_all(tasks: Sequence[tuple[RunConfig, int, int]], num_processes: int) -> list[ProcessPlan]:
    """(config, world_size, pp_rank) of each; each in a process of its own, since it patches what it imports."""
    gc.freeze()  # the forked processes need not look through what was imported
    with multiprocessing.get_context("fork").Pool(num_processes, maxtasksperchild=1) as pool:
        return pool.map(_execute, tasks, chunksize=1)


def _execute(task: tuple[RunConfig, int, int]) -> ProcessPlan:
    torch.set_num_threads(1)
    config, world_size, pp_rank = task
    return execute_process(config, world_size=world_size, pp_rank=pp_rank)


def build_job_plan(config: RunConfig, processes: list[ProcessPlan]) -> JobPlan:
    hardware, topology, model = require_hardware(config), config.topology, config.model
    dp_size = compute_world_size(config) // topology.replica_size
    rows = config.loop.micro_batch_size * compute_num_microbatches(config.loop, dp_size) * dp_size
    specs = build_adapter_specs(config.lora, model) if config.method == "lora" else []
    return JobPlan(
        method=config.method,
        recompute=config.loop.recomputation,
        tp_size=topology.tp_size,
        cp_size=topology.cp_size,
        pp_size=topology.pp_size,
        dp_size=dp_size,
        sequence_parallel=topology.sequence_parallel and topology.tp_size > 1,
        processes=processes,
        reserved_bytes=round(hardware.reserved_gib * GIB),
        memory_bytes=round(hardware.memory_gib * GIB),
        tokens_per_step=rows * config.data.seq_len,
        step_seconds=compute_step_seconds(processes, topology.pp_size),
        num_trainable=count_trainable(config),
        checkpoint_bytes=compute_checkpoint_bytes(config, specs),
    )


def compute_step_seconds(processes: Sequence[ProcessPlan], pp_size: int) -> float:
    """1F1B: every microbatch passes the slowest stage, the pipeline fills and drains, then the optimizer steps.

    Nothing is taken to overlap but the stages.
    """
    if pp_size == 1:
        return processes[0].busy_seconds
    num_microbatches = processes[0].num_microbatches
    slowest = max(process.microbatch_seconds for process in processes)
    rest = max(process.busy_seconds - num_microbatches * process.microbatch_seconds for process in processes)
    return (num_microbatches + pp_size - 1) * slowest + max(0.0, rest)


def compute_checkpoint_bytes(config: RunConfig, specs: Sequence[AdapterSpec]) -> dict[str, int]:
    """What a run of the job writes. The factors alone are the paper's measure of a checkpoint."""
    model_bytes = count_parameters(config.model) * ITEM_BYTES[config.dtype]
    if config.method == "full":
        return {"model": model_bytes, "resume state": 12 * count_parameters(config.model)}
    if config.method != "lora":
        num_trainable = count_trainable(config)
        return {"adapter fp32": 4 * num_trainable, "resume state": 12 * num_trainable, "base model": model_bytes}
    num_trained = count_lora(config, specs)
    written = double_ranks(specs) if config.lora.init == "pissa" else specs
    num_elements = count_lora(config, written)
    shapes = compute_peft_shapes(written, config.model, config.lora.bias, config.lora.modules_to_save)
    stacked = sum(torch.Size(shape).numel() for shape in shapes.values())
    return {
        "factors fp16": 2 * num_elements,
        "factors fp32": 4 * num_elements,
        "PEFT adapter fp32": 4 * stacked,
        "resume state": 12 * num_trained,
        "base model": model_bytes,
    }


def include_own_recompute(config: RunConfig) -> tuple[RunConfig, str | None]:
    """With loop.recompute in plan.recompute, where it is a kind that is not there; a note where it stays left out.

    auto stays out: it is another kind on each hardware, and none where the job does not fit. none is the default, so
    it is not known to be asked for.
    """
    own, shown = config.loop.recompute, config.plan.recompute
    if own in shown or own == "none":
        return config, None
    if own == "auto":
        more = "" if config.plan.search else "; name auto there too to see what train would choose"
        return config, f"loop.recompute=auto is left out: plan.recompute={shown} says what is planned{more}"
    place = next((i for i, kind in enumerate(shown) if RECOMPUTE.index(kind) > RECOMPUTE.index(own)), len(shown))
    return replace(config, plan=replace(config.plan, recompute=[*shown[:place], own, *shown[place:]])), None


def list_variants(config: RunConfig) -> list[RunConfig]:
    """Each method of compare.methods under each recomputation of plan.recompute."""
    return [
        replace(config, method=method, loop=set_recompute(config.loop, recompute))
        for method in config.compare.methods
        for recompute in config.plan.recompute
    ]


def set_recompute(loop: LoopConfig, recompute: str) -> LoopConfig:
    """The number of layers is for loop.recompute; every other kind is shown in all of them."""
    return replace(
        loop, recompute=recompute, recompute_layers=loop.recompute_layers if recompute == loop.recompute else None
    )
