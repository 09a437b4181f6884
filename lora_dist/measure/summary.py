"""One run in numbers: gathered over its processes, written to summary.json, compared by the report."""

import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lora_dist.base_shapes import count_parameters, list_stage_layers
from lora_dist.bottleneck_config import BOTTLENECK_METHODS
from lora_dist.config import LORA_METHODS, RunConfig, compute_num_microbatches
from lora_dist.files.directories import read_json
from lora_dist.measure.collectives import Collective, compute_count_per_layer
from lora_dist.measure.first_step import FirstStep
from lora_dist.measure.ledger import StaticLedger, StepLedger
from lora_dist.measure.memory import PeakMemory
from lora_dist.measure.meter import ThroughputSummary
from lora_dist.measure.optimizer_state import OptimizerState
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology, run_on_first
from lora_dist.writing import format_json, write_text

SUMMARY_FILE = "summary.json"

T = typing.TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The conditions under which the numbers hold."""

    world_size: int
    tp_size: int
    cp_size: int = 1
    pp_size: int
    dp_size: int
    sequence_parallel: bool
    zero_stage: int
    device: str
    dtype: str
    recompute: str
    seq_len: int
    micro_batch_size: int
    num_microbatches: int
    lr: float
    adapters: str | None
    """Ranks and targets, or sizes, in words; None where the method has no adapters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One run. Bytes of "one process" are the largest over the processes, each line by itself.

    What steps tell is None where none ran: the run's last checkpoint was whole, and nothing of its measurements left.
    """

    method: str
    model: str
    setup: Setup
    num_base_parameters: int
    """Of the whole model, adapters left out."""
    num_trainable_parameters: int
    """Of the whole model, each once, whatever the topology replicates or pads."""
    optimizer_state_bytes: int
    """fp32 masters and moments of all processes together, replicas and padding included."""
    optimizer_state_bytes_per_process: int
    optimizer_padding_bytes_per_process: int
    static_ledger: StaticLedger
    step_ledger: StepLedger | None
    peak_memory: PeakMemory | None
    """Of the process with the highest peak."""
    checkpoint_bytes: int
    """Size of the files that hold what was trained: the adapter, or the whole model."""
    throughput: ThroughputSummary | None
    """Of the slowest process; None where no step was timed."""
    cpu_seconds_per_step: float | None
    """Median CPU time of a step, summed over the processes."""
    flops_per_step: int | None
    """Computed by all processes together, attention in full."""
    tp_collectives_per_layer: float | None
    """Calls over TP of one transformer layer for one microbatch, forward and backward."""
    collectives: list[Collective] | None
    """Of one step on global rank 0."""
    valid_loss_before: float | None
    valid_loss_after: float | None
    num_steps: int
    data: dict[str, Any]
    """The data report."""

    @property
    def trainable_ratio(self) -> float:
        return self.num_trainable_parameters / self.num_base_parameters

    @property
    def ledger_bytes(self) -> dict[str, int | None]:
        """The ledger of one process by the names that reports show."""
        step = self.step_ledger
        return {
            "frozen weights": self.static_ledger.frozen_weight_bytes,
            "trainable weights": self.static_ledger.trainable_weight_bytes,
            "gradients": None if step is None else step.gradient_bytes,
            "optimizer state": self.static_ledger.optimizer_state_bytes,
            "saved activations": None if step is None else step.activation_bytes,
        }

    def write(self, path: Path) -> None:
        write_text(path, format_json(asdict(self)))

    @staticmethod
    def read(path: Path) -> "Summary":
        """What `write` wrote. ValueError naming the file where it is damaged, lacks a field or has one too many."""
        try:
            return read_summary(read_json(path))
        except ValueError as error:
            raise ValueError(f"{error}; remove {path}, and a finished run writes it anew") from None


def read_summary(values: dict[str, Any]) -> Summary:
    """The inverse of `dataclasses.asdict`."""
    summary: Summary = _rebuild(Summary, values)
    return summary


def _rebuild(hint: Any, value: Any) -> Any:
    """`value` with the dataclasses that `hint` names put back in."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if set(value) != {field.name for field in fields(hint)}:
            difference = sorted(set(value) ^ {field.name for field in fields(hint)})
            raise ValueError(
                f"the fields of {getattr(hint, '__name__', hint)} differ from this version's in {', '.join(difference)}"
            )
        return hint(**{name: _rebuild(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    if typing.get_origin(hint) is types.UnionType:
        return None if value is None else _rebuild(typing.get_args(hint)[0], value)
    if typing.get_origin(hint) is list:
        return [_rebuild(typing.get_args(hint)[0], part) for part in value]
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class _ProcessRecord:
    """What one process contributes."""

    trainable: dict[str, int]
    """Elements of each whole parameter it holds a shard of."""
    num_layers: int
    optimizer_state: OptimizerState
    static: StaticLedger
    first_step: FirstStep | None
    peak_memory: PeakMemory | None
    throughput: ThroughputSummary | None


def build_summary(
    config: RunConfig,
    topology: Topology,
    *,
    trainable: Sequence[TrainableParameter],
    optimizer_state: OptimizerState,
    static: StaticLedger,
    first_step: FirstStep | None,
    peak_memory: PeakMemory | None,
    throughput: ThroughputSummary | None,
    data: dict[str, Any],
    valid_loss_before: float | None,
    valid_loss_after: float | None,
    checkpoint_dir: Path,
) -> Summary:
    """Every process calls it at the end of a run, gets the same summary, and finds it in the run's summary.json.

    Two collectives over the world. A finished run that was resumed has measured nothing: its earlier summary stands,
    where it is of as many steps.
    """
    mine = _ProcessRecord(
        trainable={one.name: math.prod(one.full_shape) for one in trainable if one.owned},
        num_layers=len(list_stage_layers(config.model, topology.pp_rank, topology.pp_size)),
        optimizer_state=optimizer_state,
        static=static,
        first_step=first_step,
        peak_memory=peak_memory,
        throughput=throughput,
    )
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)

    def settle() -> Summary:
        path = Path(config.run_dir) / SUMMARY_FILE
        if first_step is None and path.exists():
            earlier = Summary.read(path)
            if earlier.num_steps >= config.loop.total_steps:  # else the run went on, and ended before it wrote its own
                return earlier
        measured = _combine(config, topology, gathered)
        summary = Summary(
            **measured,
            checkpoint_bytes=measure_files([checkpoint_dir]),
            valid_loss_before=valid_loss_before,
            valid_loss_after=valid_loss_after,
            num_steps=config.loop.total_steps,
            data=data,
        )
        summary.write(path)
        return summary

    return run_on_first(topology, settle)


def _combine(config: RunConfig, topology: Topology, records: Sequence[_ProcessRecord]) -> dict[str, Any]:
    """The fields of a summary that come from all processes."""
    timed = [record.throughput for record in records if record.throughput is not None]
    peaks = [record.peak_memory for record in records if record.peak_memory is not None]
    whole_parameters = {name: size for record in records for name, size in record.trainable.items()}
    setup = describe_setup(config, topology)
    return {
        "method": config.method,
        "model": config.model.name,
        "setup": setup,
        "num_base_parameters": count_parameters(config.model),
        "num_trainable_parameters": sum(whole_parameters.values()),
        "optimizer_state_bytes": sum(record.optimizer_state.state_bytes for record in records),
        "optimizer_state_bytes_per_process": max(record.optimizer_state.state_bytes for record in records),
        "optimizer_padding_bytes_per_process": max(record.optimizer_state.padding_bytes for record in records),
        "static_ledger": _take_largest(StaticLedger, [record.static for record in records]),
        "peak_memory": max(peaks, key=lambda peak: peak.peak_bytes, default=None),
        "throughput": max(timed, key=lambda one: one.step_time_ms.median, default=None),
        "cpu_seconds_per_step": sum(one.cpu_seconds_per_step.median for one in timed) if timed else None,
        **_combine_first_steps(records, num_microbatches=setup.num_microbatches),
    }


def _combine_first_steps(records: Sequence[_ProcessRecord], *, num_microbatches: int) -> dict[str, Any]:
    """What a step's instruments tell: nothing where none ran, on every process alike."""
    steps = [(record.first_step, record.num_layers) for record in records if record.first_step is not None]
    if not steps:
        return dict.fromkeys(("step_ledger", "flops_per_step", "tp_collectives_per_layer", "collectives"))
    return {
        "step_ledger": _take_largest(StepLedger, [step.ledger for step, _ in steps]),
        "flops_per_step": sum(step.flops for step, _ in steps),
        "tp_collectives_per_layer": max(
            compute_count_per_layer(
                step.collectives, group="tp", num_layers=num_layers, num_microbatches=num_microbatches
            )
            for step, num_layers in steps
        ),
        "collectives": steps[0][0].collectives,
    }


def describe_setup(config: RunConfig, topology: Topology) -> Setup:
    """Of a run that trains as `config` says; its recomputation in the words of the configuration."""
    return Setup(
        world_size=topology.world_size,
        tp_size=topology.tp_size,
        cp_size=topology.cp_size,
        pp_size=topology.pp_size,
        dp_size=topology.dp_size,
        sequence_parallel=topology.sequence_parallel,
        zero_stage=config.zero.stage,
        device=topology.device.type,
        dtype=config.dtype,
        recompute=config.loop.recomputation,
        seq_len=config.data.seq_len,
        micro_batch_size=config.loop.micro_batch_size,
        num_microbatches=compute_num_microbatches(config.loop, topology.dp_size),
        lr=config.optim.lr,
        adapters=_describe_adapters(config),
    )


def _describe_adapters(config: RunConfig) -> str | None:
    lora, bottleneck, prefix = config.lora, config.bottleneck, config.prefix
    if config.method in BOTTLENECK_METHODS:
        return f"bottlenecks of {bottleneck.size} features, {bottleneck.activation}"
    parts = []
    if config.method in LORA_METHODS:
        parts.append(f"lora_rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}")
    if config.slots is not None:
        parts.append(f"{prefix.num_prefix} positions before the context and {prefix.num_infix} before the target")
    return "; ".join(parts) or None


def _take_largest(kind: type[T], ledgers: Sequence[T]) -> T:
    """Each line's largest value over the processes."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: max(getattr(ledger, name) for ledger in ledgers) for name in names})


def measure_files(paths: Iterable[Path]) -> int:
    """Bytes of files, and of all files under directories."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total
