"""Which topologies of the given GPUs hold a job, best predicted first, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from lora_dist.base_format import check_blocks
from lora_dist.base_shapes import compute_layer_shapes, count_elements, list_stage_layers
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.long_rows import check_long_rows
from lora_dist.lora.layer import find_shared_ranges
from lora_dist.mcore.base_parameters import SHARED_ROWS, find_shard_dim
from lora_dist.mcore.model import compute_padded_vocab_size
from lora_dist.needed_bytes import compute_format_savings
from lora_dist.plan.execute import require_hardware
from lora_dist.plan.job import GIB, ITEM_BYTES, JobPlan, build_job_plan, execute_all, set_recompute
from lora_dist.plan.process_plan import ProcessPlan
from lora_dist.plan.stages import group_stages


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One topology; `job` where it was executed, `reason` where it does not do."""

    tp_size: int
    cp_size: int = 1
    pp_size: int
    dp_size: int
    num_idle: int = 0
    """GPUs of the given ones that it leaves out."""
    recompute: str = ""
    job: JobPlan | None = None
    reason: str | None = None

    @property
    def replica(self) -> str:
        """The sizes of one."""
        context = f" cp{self.cp_size}" if self.cp_size > 1 else ""
        return f"tp{self.tp_size}{context} pp{self.pp_size}"

    @property
    def name(self) -> str:
        return f"{self.replica} dp{self.dp_size}"

    @property
    def num_gpus(self) -> int:
        return self.tp_size * self.cp_size * self.pp_size * self.dp_size


def search_topologies(config: RunConfig) -> list[Candidate]:
    """Every topology of plan.num_gpus GPUs: those that fit by predicted throughput, then the others.

    Where a job fits with one value of plan.recompute those after it are not looked at. ValueError where plan.num_gpus
    is not set.
    """
    if config.plan.num_gpus is None:
        raise ValueError("plan.search=true needs plan.num_gpus=N, the GPUs there are")
    if "auto" in config.plan.recompute:
        raise ValueError(
            "plan.search=true tries what plan.recompute names in turn; use e.g. [none,selective,full], not auto"
        )
    candidates = [_refuse_unexecuted(config, one) for one in list_candidates(config)]
    for recompute in config.plan.recompute:
        candidates = _try_all(config, candidates, recompute)
    fitting = [one for one in candidates if one.reason is None]
    fitting.sort(key=lambda one: -_count_tokens_per_sec(one))
    return fitting + [one for one in candidates if one.reason is not None]


def _count_tokens_per_sec(one: Candidate) -> float:
    assert one.job is not None
    return one.job.tokens_per_sec_per_gpu * one.num_gpus


def list_candidates(config: RunConfig) -> list[Candidate]:
    """Sizes that divide the model, on as many replicas as there are GPUs and rows for."""
    assert config.plan.num_gpus is not None
    num_gpus, model = config.plan.num_gpus, config.model
    found = []
    num_groups = model.num_query_groups
    split = gcd(model.num_heads, model.delta_key_heads or 0, *model.mlp_sizes)
    for tp_size in _list_divisors(split, num_gpus):
        if num_groups % tp_size and tp_size % num_groups:
            continue
        for pp_size in _list_pipelines(model.num_layers, num_gpus // (tp_size * config.topology.cp_size)):
            one = Candidate(tp_size=tp_size, cp_size=config.topology.cp_size, pp_size=pp_size, dp_size=1)
            one = replace(one, dp_size=_choose_dp_size(config, num_gpus // one.num_gpus))
            found.append(replace(one, num_idle=num_gpus - one.num_gpus))
    return found


def _list_divisors(number: int, limit: int) -> list[int]:
    return [size for size in range(1, limit + 1) if number % size == 0]


def _list_pipelines(num_layers: int, limit: int) -> list[int]:
    """Those whose stages have as many layers each, and the powers of two that clusters are made of."""
    sizes = {size for size in range(1, limit + 1) if num_layers % size == 0 or size.bit_count() == 1}
    return sorted(size for size in sizes if size <= num_layers)


def _choose_dp_size(config: RunConfig, limit: int) -> int:
    """The most replicas that the rows of a step divide over."""
    rows = config.loop.global_batch_size
    if rows is None:
        return limit
    fitting = [n for n in range(1, limit + 1) if rows % (n * config.loop.micro_batch_size) == 0]
    return max(fitting, default=1)


def _refuse_unexecuted(config: RunConfig, one: Candidate) -> Candidate:
    """What its sizes alone rule out."""
    hardware = require_hardware(config)
    if one.tp_size > 1 and hardware.gpus_per_node % one.tp_size:
        reason = f"tp{one.tp_size} does not divide a node of {hardware.gpus_per_node} GPUs"
        return replace(one, reason=reason)
    try:
        model = config.model
        check_blocks(model.base_format, model.split_sizes, tp_size=one.tp_size)
        check_long_rows(model, num_positions=config.data.seq_len, pp_size=one.pp_size)
    except ValueError as refusal:
        return replace(one, reason=str(refusal))
    weight_bytes = compute_weight_bytes(config.model, config.dtype, tp_size=one.tp_size, pp_size=one.pp_size)
    if weight_bytes > hardware.memory_gib * GIB:
        reason = f"{weight_bytes / GIB:.1f} GiB of weights > {hardware.memory_gib:.1f} GiB"
        return replace(one, reason=reason)
    return one


def compute_weight_bytes(model: ModelConfig, dtype: str, *, tp_size: int, pp_size: int) -> int:
    """Of the fullest stage's base shard; exact."""
    h, kind = model.hidden_size, model.architecture
    vocab = compute_padded_vocab_size(model.vocab_size, tp_size) // tp_size * h
    num_positions = 0 if kind.rotary else model.max_position_embeddings + kind.position_offset
    first, last = vocab + num_positions * h, vocab + h * (1 if kind.rms_norm else 2)
    if pp_size == 1:
        first += last - (vocab if model.tied_output else 0)
    stage_bytes = []
    for pp_rank in range(pp_size):
        layers = list_stage_layers(model, pp_rank, pp_size)
        ends = first if pp_rank == 0 else last if pp_rank == pp_size - 1 else 0
        native = ITEM_BYTES[dtype] * (sum(_count_shard(model, layer, tp_size) for layer in layers) + ends)
        stage_bytes.append(native - compute_format_savings(model, ITEM_BYTES[dtype], tp_size, layers))
    return max(stage_bytes)


def _count_shard(model: ModelConfig, layer: int, tp_size: int) -> int:
    """Parameters of a layer that a TP rank has."""
    shapes = compute_layer_shapes(model, layer)
    shared = find_shared_ranges(model, tp_size)
    for part, rows in SHARED_ROWS.items() if shared else ():  # each rank's keys and values are whole
        num_rows = tp_size * sum(size for _, size in shared[rows][0])
        shapes |= {name: (num_rows, *shape[1:]) for name, shape in shapes.items() if part in name}
    whole = {name: shape for name, shape in shapes.items() if find_shard_dim(name) is None}
    split = {name: shape for name, shape in shapes.items() if name not in whole}
    return count_elements(whole) + count_elements(split) // tp_size


def _try_all(config: RunConfig, candidates: Sequence[Candidate], recompute: str) -> list[Candidate]:
    """Execute the first stage, which holds the most microbatches, and of those that fit so far the other kinds."""
    jobs: dict[str, RunConfig] = {}
    judged: dict[str, Candidate] = {}
    for one in candidates:
        if one.job is None and (one.reason is None or one.recompute):
            try:
                jobs[one.name] = _configure(config, one, recompute)
            except ValueError as refusal:
                judged[one.name] = replace(one, recompute=recompute, reason=one.reason or str(refusal))
    open_ones = [one for one in candidates if one.name in jobs]
    first = execute_all([(jobs[one.name], one.num_gpus, 0) for one in open_ones], config.plan.num_processes)
    kinds = {one.name: group_stages(jobs[one.name], with_first=True) for one in open_ones}
    tried = {
        one.name: [replace(process, pp_ranks=kinds[one.name][0])] for one, process in zip(open_ones, first, strict=True)
    }
    more = [(one, alike) for one in open_ones if _fits(config, tried[one.name]) for alike in kinds[one.name][1:]]
    rest = execute_all([(jobs[one.name], one.num_gpus, alike[0]) for one, alike in more], config.plan.num_processes)
    for (one, alike), process in zip(more, rest, strict=True):
        tried[one.name].append(replace(process, pp_ranks=alike))
    judged |= {one.name: _judge(config, one, recompute, jobs[one.name], tried[one.name]) for one in open_ones}
    return [judged.get(one.name, one) for one in candidates]


def _configure(config: RunConfig, one: Candidate, recompute: str) -> RunConfig:
    """ValueError where the job's other settings rule the topology out."""
    topology = replace(
        config.topology,
        tp_size=one.tp_size,
        pp_size=one.pp_size,
        dp_size=one.dp_size,
        sequence_parallel=one.tp_size > 1,
    )
    if config.data.seq_len % topology.row_multiple:
        topology = replace(topology, sequence_parallel=False)
    plan = replace(config.plan, num_gpus=one.num_gpus)
    return replace(config, topology=topology, plan=plan, loop=set_recompute(config.loop, recompute))


def _fits(config: RunConfig, processes: Sequence[ProcessPlan]) -> bool:
    return max(process.peak_bytes for process in processes) <= require_hardware(config).available_gib * GIB


def _judge(
    config: RunConfig, one: Candidate, recompute: str, job: RunConfig, processes: list[ProcessPlan]
) -> Candidate:
    if _fits(config, processes):
        return replace(one, recompute=recompute, reason=None, job=build_job_plan(job, processes))
    fullest = max(processes, key=lambda process: process.peak_bytes)
    available = require_hardware(config).available_gib
    reason = f"{fullest.peak_bytes / GIB:.1f} GiB on the {fullest.stage} stage > {available:.1f} GiB left of the GPU"
    return replace(one, recompute=recompute, reason=reason)
