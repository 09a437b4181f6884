"""Execute one step of one process of a job, all of lora_dist's own code, on fake tensors, and account for it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from lora_dist.batch import Batch
from lora_dist.config import HardwareConfig, RunConfig, compute_dp_size, compute_num_microbatches
from lora_dist.engine import Engine
from lora_dist.mcore.experts import choose_expert_products
from lora_dist.mcore.fake import open_fake_topology
from lora_dist.mcore.model import compute_padded_vocab_size
from lora_dist.measure.collectives import CollectiveCounter, count_collectives
from lora_dist.parameters import TrainableParameter
from lora_dist.plan.answers import Answers
from lora_dist.plan.attention import PlannedAttention
from lora_dist.plan.clock import ComputeClock, compute_message_seconds
from lora_dist.plan.live_bytes import ADAPTERS, BASE, COMMUNICATION, HOST, KINDS, OPTIMIZER, LiveBytes, watch_gradients
from lora_dist.plan.meta_tensors import MetaTensors
from lora_dist.plan.observer import Observer
from lora_dist.plan.process_plan import ProcessPlan, name_stage
from lora_dist.plan.steady import WatchedBatches, Work, compute_num_executed, compute_num_warmup, count_calls
from lora_dist.quant.weight import find_quantized
from lora_dist.run import build_engine
from lora_dist.topology import Topology
from lora_dist.zero.engine import ZeroEngine
from lora_dist.zero.fake import use_fake_stand_ins

_CUDA_GRANULARITY = 512
"""Bytes; CUDA's allocator hands out multiples of it."""


def execute_process(config: RunConfig, *, world_size: int, pp_rank: int) -> ProcessPlan:
    """The first TP rank of the first replica's stage `pp_rank` in a job of `world_size` processes.

    Call it in a process that does nothing else. ValueError where the hardware has no products of config.dtype.
    """
    hardware = require_hardware(config)
    use_fake_stand_ins()
    topology_config = config.topology
    global_rank = pp_rank * (world_size // topology_config.pp_size)
    with open_fake_topology(topology_config, world_size=world_size, global_rank=global_rank) as topology:
        return _FakeRun(config, hardware, topology).execute()


def require_hardware(config: RunConfig) -> HardwareConfig:
    hardware = config.hardware
    if hardware is None:
        raise ValueError("hardware is not set; name one, e.g. hardware=v100_32gb")
    if config.dtype not in hardware.peak_tflops:
        known = ", ".join(hardware.peak_tflops)
        raise ValueError(f"dtype={config.dtype}: {hardware.name} computes in {known}; choose one of them")
    return hardware


@dataclass(slots=True)
class _FakeRun:
    config: RunConfig
    hardware: HardwareConfig
    topology: Topology

    def execute(self) -> ProcessPlan:
        config, topology = self.config, self.topology
        num_microbatches = compute_num_microbatches(config.loop, topology.dp_size)
        num_executed = compute_num_executed(topology.pp_rank, topology.pp_size, num_microbatches)
        live = LiveBytes(granularity=_CUDA_GRANULARITY if self.hardware.kind == "gpu" else 1)
        clock = ComputeClock(self.hardware)
        with self._open_modes(live, clock) as (answers, counter):
            engine, _ = build_engine(replace(config, compile=False, cuda_graphs=False), topology, fill=False)
            on_gpu = self.hardware.kind == "gpu"
            engine.gpt.attends_in_blocks = config.attends_in_blocks(on_gpu=on_gpu)
            choose_expert_products(engine.gpt, on_gpu=on_gpu)
            if on_gpu:
                for group in engine.zero.adam.param_groups:
                    group["foreach"] = True  # as torch chooses there; it makes fewer temporaries
            answers.know_step_counts(state["step"] for state in engine.zero.adam.state.values())
            declare_holdings(live, engine, adapters=config.method != "full", on_host=config.zero.offload_optimizer)
            setup_peak_bytes, held_bytes = live.peak_total, live.total
            if config.zero.stage == 3:  # learns in one step in which order to gather, and gathers ahead from the next
                engine.train_step(build_batches(config, topology, 1), step=0, lr=config.optim.lr)
            live.restart_peak()

            def read_work() -> Work:
                return Work(flops=clock.flops, seconds=clock.seconds, collectives=count_calls(counter.read()))

            start = read_work()
            batches = WatchedBatches(build_batches(config, topology, num_executed), read_work)
            with live.watch_saved(engine.gpt.parameters() if config.zero.stage == 3 else ()):
                stop_watching = watch_gradients(live, (one.parameter for one in engine.trainable))
                engine.train_step(batches, step=0, lr=config.optim.lr)
                stop_watching()
            work = read_work().since(start)
        steady = batches.compute_steady(compute_num_warmup(topology.pp_rank, topology.pp_size))
        if steady is not None:
            work = work.plus(steady, num_microbatches - num_executed)
        return self._describe(
            engine, live, (held_bytes, setup_peak_bytes), work, steady, (num_microbatches, num_executed)
        )

    @contextmanager
    def _open_modes(self, live: LiveBytes, clock: ComputeClock) -> Iterator[tuple[Answers, CollectiveCounter]]:
        """Each sees what those entered after it pass on."""
        config = self.config
        num_vocab_rows = compute_padded_vocab_size(config.model.vocab_size, self.topology.tp_size)
        with ExitStack() as stack:
            stack.enter_context(MetaTensors())
            answers = stack.enter_context(Answers(-(-compute_num_targets(config) // config.topology.cp_size)))
            stack.enter_context(Observer(live, clock, num_vocab_rows // self.topology.tp_size))
            counter = stack.enter_context(count_collectives(self.topology))
            stack.enter_context(PlannedAttention(self.hardware))
            yield answers, counter

    def _describe(
        self,
        engine: Engine,
        live: LiveBytes,
        setup: tuple[int, int],
        work: Work,
        steady: Work | None,
        counts: tuple[int, int],
    ) -> ProcessPlan:
        topology, (held_bytes, setup_peak_bytes), (num_microbatches, num_executed) = self.topology, setup, counts
        communication_seconds = self._compute_communication_seconds(work)
        if steady is None:
            microbatch_seconds = (work.seconds + communication_seconds) / num_microbatches
        else:
            microbatch_seconds = steady.seconds + self._compute_communication_seconds(steady)
        return ProcessPlan(
            pp_rank=topology.pp_rank,
            pp_ranks=(topology.pp_rank,),
            stage=name_stage(topology.pp_rank, topology.pp_size),
            num_layers=engine.gpt.num_stage_layers,
            num_parameters=_count_parameters(engine.gpt),
            num_trainable=sum(_count_elements(one.parameter) for one in engine.trainable),
            ledger={kind: live.peak[kind] for kind in KINDS},
            peak_bytes=max(live.peak_total, setup_peak_bytes),
            setup_peak_bytes=setup_peak_bytes,
            held_bytes=held_bytes,
            largest=live.largest,
            num_in_flight=min(num_microbatches, compute_num_warmup(topology.pp_rank, topology.pp_size) + 1),
            num_microbatches=num_microbatches,
            num_executed=num_executed,
            flops=work.flops,
            collectives=work.list_collectives(),
            compute_seconds=work.seconds,
            communication_seconds=communication_seconds,
            microbatch_seconds=microbatch_seconds,
        )

    def _compute_communication_seconds(self, work: Work) -> float:
        groups = list_group_members(self.topology)
        total = 0.0
        for one in work.list_collectives():
            ranks = self._list_neighbours() if one.op in ("send", "recv") else groups[one.group]
            nodes = {rank // self.hardware.gpus_per_node for rank in ranks}
            seconds = compute_message_seconds(one, len(ranks), within_node=len(nodes) == 1, hardware=self.hardware)
            total += one.count * seconds
        return total

    def _list_neighbours(self) -> list[int]:
        """This process and the one that it sends activations to, or has them from."""
        topology = self.topology
        distance = topology.tp_size * topology.zero_size
        return [topology.global_rank, topology.global_rank + (-distance if topology.is_last_stage else distance)]


def list_group_members(topology: Topology) -> Mapping[str, list[int]]:
    """Global ranks of each group that `count_collectives` names."""
    groups = {
        "world": dist.group.WORLD,
        "embedding": topology.embedding_group,
        "tp_x_pp": topology.model_parallel_group,
        "dp": topology.zero_group,
        "cp": topology.cp_group,
        "pp": topology.pp_group,
        "tp": topology.tp_group,
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items() if group is not None}


def declare_holdings(live: LiveBytes, engine: Engine, *, adapters: bool, on_host: bool) -> None:
    """Tell the account what is alive before the first step. What is left over is DeepSpeed's own."""
    live.declare([*map(_resident, engine.gpt.parameters()), *engine.gpt.buffers()], BASE)
    live.declare(_list_trainable(engine.trainable), ADAPTERS if adapters else BASE)
    live.declare(_list_optimizer_tensors(engine.zero), HOST if on_host else OPTIMIZER)
    live.declare_rest(HOST if on_host else COMMUNICATION, (BASE, ADAPTERS, OPTIMIZER, HOST))


def _list_trainable(trainable: list[TrainableParameter]) -> list[torch.Tensor]:
    return [_resident(one.parameter) for one in trainable]


def _resident(parameter: torch.Tensor) -> torch.Tensor:
    """ZeRO 3 keeps this process's slice beside the parameter, which is empty between uses."""
    slice_: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return slice_


def _count_parameters(gpt: nn.Module) -> int:
    quantized = sum(weight.shape.numel() for weight in find_quantized(gpt))
    return quantized + sum(_count_elements(parameter) for parameter in gpt.parameters())


def _count_elements(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _list_optimizer_tensors(zero: ZeroEngine) -> list[torch.Tensor]:
    """Masters where they are not the parameters themselves, moments and step counts."""
    states = zero.adam.state.items()
    masters = [] if zero.stage == 0 else [master for master, _ in states]
    return masters + [value for _, state in states for value in state.values() if isinstance(value, torch.Tensor)]


def compute_num_targets(config: RunConfig) -> int:
    """Target tokens of one microbatch, on all the processes that its rows are split over."""
    return max(1, round(config.plan.target_fraction * config.loop.micro_batch_size * config.data.seq_len))


def build_batches(config: RunConfig, topology: Topology, num_batches: int) -> list[Batch]:
    """Microbatches of full rows; of their values only the number of targets counts. Packed rows hold one example each,
    the most that their attention can cost."""
    B, S = config.loop.micro_batch_size, config.data.seq_len
    num_microbatches = compute_num_microbatches(config.loop, topology.dp_size)
    rows_per_step = B * num_microbatches * topology.dp_size

    def row() -> torch.Tensor:
        return torch.zeros(B, S, dtype=torch.int64)

    return [
        Batch(
            input_ids_BS=row(),
            labels_BS=row(),
            loss_mask_BS=torch.arange(B * S).view(B, S) < compute_num_targets(config),
            position_ids_BS=row(),
            row_blocks=((S,),) * B if config.data.collate == "pack" else None,
            row_ids_B=torch.zeros(B, dtype=torch.int64),
            num_loss_tokens=compute_num_targets(config) * num_microbatches * topology.dp_size,
            num_tokens=rows_per_step * S,
            slots_BS=None if config.slots is None else row(),
        )
        for _ in range(num_batches)
    ]


def compute_world_size(config: RunConfig) -> int:
    """Processes of the planned job. ValueError where plan.num_gpus does not match the topology."""
    topology = config.topology
    world_size = config.plan.num_gpus or topology.num_processes
    compute_dp_size(topology, world_size, source="plan.num_gpus is")
    return world_size
