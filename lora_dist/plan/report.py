"""The plan as text, plan.json and stacked bars."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_dist.config import RunConfig
from lora_dist.measure.plots import save_bars
from lora_dist.measure.report_table import format_bytes
from lora_dist.plan.execute import require_hardware
from lora_dist.plan.job import GIB, JobPlan
from lora_dist.plan.live_bytes import ADAPTERS, BASE, GRADIENTS, KINDS, OPTIMIZER, SAVED
from lora_dist.plan.paper import MODEL, PaperRow, compare_with_paper, describe_headroom
from lora_dist.plan.process_plan import ProcessPlan
from lora_dist.plan.search import Candidate
from lora_dist.writing import format_json, write_text

CONTEXT = "context"


def write_plan(config: RunConfig, jobs: Sequence[JobPlan]) -> str:
    """plan.json and memory.png into config.run_dir; the text to print."""
    run_dir = Path(config.run_dir)
    paper = compare_with_paper(jobs) if config.model.name == MODEL else []
    content = {
        "hardware": asdict(require_hardware(config)),
        "jobs": [job.describe() for job in jobs],
        "paper": [asdict(row) for row in paper],
    }
    write_text(run_dir / "plan.json", format_json(content))
    _draw(run_dir / "memory.png", config, jobs)
    return render_plan(config, jobs, paper)


def write_search(config: RunConfig, candidates: Sequence[Candidate]) -> str:
    """search.json into config.run_dir; the text to print."""
    rows = [
        {**asdict(one), "name": one.name, "job": None if one.job is None else one.job.describe()} for one in candidates
    ]
    content = {"hardware": asdict(require_hardware(config)), "candidates": rows}
    write_text(Path(config.run_dir) / "search.json", format_json(content))
    return render_search(config, candidates)


def render_plan(config: RunConfig, jobs: Sequence[JobPlan], paper: Sequence[PaperRow]) -> str:
    parts = [_describe_job(config, jobs[0]), _render_summary(jobs), _render_ledgers(jobs), _render_collectives(jobs[0])]
    headroom = describe_headroom(jobs)
    if headroom is not None:
        parts.append(headroom)
    if paper:
        parts.append(_render_paper(paper))
    return "\n\n".join(parts)


def _describe_job(config: RunConfig, job: JobPlan) -> str:
    loop, sequence = config.loop, ", sequence parallel" if job.sequence_parallel else ""
    context = f" x cp {job.cp_size}" if job.cp_size > 1 else ""
    return (
        f"{config.model.name} on {job.world_size} x {require_hardware(config).name}:"
        f" tp {job.tp_size}{context} x pp {job.pp_size} x dp {job.dp_size}{sequence},"
        f" {_describe_precision(config)}, ZeRO {config.zero.stage}\n"
        f"a step: {job.tokens_per_step:,} tokens in {job.processes[0].num_microbatches} microbatches of"
        f" {loop.micro_batch_size} x {config.data.seq_len} on each replica;"
        f" {config.plan.target_fraction:.0%} of them target tokens"
    )


def _describe_precision(config: RunConfig) -> str:
    base_format = config.model.base_format
    return config.dtype if base_format == "native" else f"{config.dtype} over {base_format}"


def _render_summary(jobs: Sequence[JobPlan]) -> str:
    rows = [["", *(_name(job) for job in jobs)]]
    rows.append(["trainable parameters", *(f"{job.num_trainable:,}" for job in jobs)])
    rows.append(["fullest GPU, GiB", *(f"{job.needed_bytes / GIB:.2f}" for job in jobs)])
    rows.append(["of the GPU's GiB", *(f"{job.memory_bytes / GIB:.2f}" for job in jobs)])
    rows.append(["fits", *("yes" if job.fits else "NO" for job in jobs)])
    rows.append(["weights, gradients, optimizer of all GPUs", *(format_bytes(job.state_bytes) for job in jobs)])
    rows.append(["PFLOP a step, all GPUs", *(f"{job.flops / 1e15:.4g}" for job in jobs)])
    rows.append(["step time, s", *(f"{job.step_seconds:.4g}" for job in jobs)])
    rows.append(["tokens/s/GPU", *(f"{job.tokens_per_sec_per_gpu:,.1f}" for job in jobs)])
    rows += _list_file_rows(jobs)
    return _align(rows)


def _list_file_rows(jobs: Sequence[JobPlan]) -> list[list[str]]:
    names = list(dict.fromkeys(name for job in jobs for name in job.checkpoint_bytes))
    return [[f"file: {name}", *(_format_size(job.checkpoint_bytes.get(name)) for job in jobs)] for name in names]


def _format_size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def _name_stage(process: ProcessPlan, job: JobPlan) -> str:
    """With its number where stages between differ in their adapters or attention."""
    kinds = [one for one in job.processes if one.stage == "middle"]
    return f"middle {process.pp_rank}" if process in kinds and len(kinds) > 1 else process.stage


def _name(job: JobPlan) -> str:
    return f"{job.method}, recompute {job.recompute}"


def _render_ledgers(jobs: Sequence[JobPlan]) -> str:
    rows = [["GiB at the peak", "stage", *KINDS, CONTEXT, "sum", "in flight", "parameters", "TFLOP"]]
    for job in jobs:
        for process in job.processes:
            parts = [*process.ledger.values(), job.reserved_bytes]
            numbers = [_format_gib(part) for part in (*parts, process.peak_bytes + job.reserved_bytes)]
            shape = [str(process.num_in_flight), f"{process.num_parameters:,}", f"{process.flops / 1e12:,.4g}"]
            rows.append([_name(job), _name_stage(process, job), *numbers, *shape])
    return _align(rows)


def _format_gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def _render_collectives(job: JobPlan) -> str:
    rows = [["collectives a step", "stage", "operation", "group", "bytes a call", "calls", "sum"]]
    for process in job.processes:
        for one in process.collectives:
            total = format_bytes(one.payload_bytes * one.count)
            names = [_name(job), _name_stage(process, job), one.op, one.group]
            rows.append([*names, f"{one.payload_bytes:,}", str(one.count), total])
    return _align(rows)


def _render_paper(paper: Sequence[PaperRow]) -> str:
    table = _align([["", "paper", "plan"], *([row.quantity, row.paper, row.plan] for row in paper)])
    notes = [f"  {row.quantity}: {row.why}." for row in paper]
    return "\n".join([table, *notes])


def render_search(config: RunConfig, candidates: Sequence[Candidate]) -> str:
    """The topologies that fit, best first; the smallest replicas among them; why the others do not."""
    hardware = require_hardware(config)
    fitting = [one for one in candidates if one.job is not None]
    head = (
        f"{config.model.name}, {config.method}, {_describe_precision(config)}"
        f" on {config.plan.num_gpus} x {hardware.name}"
        f" ({hardware.available_gib:.1f} GiB free of {hardware.memory_gib:.1f}): {len(fitting)} of"
        f" {len(candidates)} topologies fit"
    )
    parts = [head]
    if fitting:
        parts.append(_align([["fits", "GPUs", "recompute", "GiB", "step s", "tokens/s/GPU"], *map(_describe, fitting)]))
        for recompute in config.plan.recompute:
            fewest = min((one for one in fitting if one.recompute == recompute), key=_count_gpus, default=None)
            if fewest is not None:
                size = f"{_count_gpus(fewest)} ({fewest.replica})"
                parts.append(f"fewest GPUs a replica with recompute {recompute}: {size}")
    refused = [f"  {one.name}: {one.reason}" for one in candidates if one.job is None]
    return "\n".join([*parts, *(["does not fit:"] if refused else []), *refused])


def _count_gpus(one: Candidate) -> int:
    return one.num_gpus // one.dp_size


def _describe(one: Candidate) -> list[str]:
    assert one.job is not None
    job = one.job
    numbers = [f"{job.needed_bytes / GIB:.2f}", f"{job.step_seconds:.4g}", f"{job.tokens_per_sec_per_gpu:,.1f}"]
    return [one.name, str(one.num_gpus), job.recompute, *numbers]


def _draw(path: Path, config: RunConfig, jobs: Sequence[JobPlan]) -> None:
    hardware = require_hardware(config)
    stacks = {
        f"{job.method}\n{job.recompute}\n{process.pp_rank}": _stack(job, process)
        for job in jobs
        for process in job.processes
    }
    title = f"{config.model.name}, {jobs[0].world_size} x {hardware.name} of {hardware.memory_gib:.1f} GiB"
    save_bars(path, title=title, ylabel="GiB at the peak (method, recompute, pp_rank)", stacks=stacks)


def _stack(job: JobPlan, process: ProcessPlan) -> dict[str, float]:
    named = {kind: process.ledger[kind] / GIB for kind in (BASE, ADAPTERS, OPTIMIZER, GRADIENTS, SAVED)}
    named["logits, buffers, context"] = (process.peak_bytes + job.reserved_bytes) / GIB - sum(named.values())
    return named


def _align(rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
