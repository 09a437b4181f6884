"""The comparison of runs: report.json, report.md, three PNGs, and the table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_dist.config import RunConfig
from lora_dist.measure.comparable import check_comparable
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.metrics_file import METRICS_FILE, read_metrics
from lora_dist.measure.plots import Curve, save_bars, save_curves, save_spread_bars
from lora_dist.measure.report_table import BASELINE, Row, build_rows, name_memory, sum_ledger
from lora_dist.measure.summary import Summary
from lora_dist.measure.wandb_sink import open_wandb
from lora_dist.writing import format_json, write_text

_MAX_COLUMNS = 100
_MIB = 2**20
PAPER_NOTES = (
    "The paper's figures are GPT-3 175B's (arXiv:2106.09685): 10,000x fewer trainable parameters, 1.2 TB -> 350 GB of"
    " GPU memory, 350 GB -> 35 MB checkpoints (lora_rank 4, query and value), 32.5 -> 43.1 tokens/s a V100 (1.33x).",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `compare` made: the runs, the table, the files."""

    summaries: list[Summary]
    rows: list[Row]
    plots: list[Path]

    @property
    def columns(self) -> list[str]:
        return ["", *[summary.method for summary in self.summaries], *_ratio_column(self.summaries), "paper"]

    @property
    def cells(self) -> list[list[str]]:
        """The table under `columns`."""
        with_ratio = bool(_ratio_column(self.summaries))
        return [[row.label, *row.values, *([row.ratio] if with_ratio else []), row.paper] for row in self.rows]


def write_comparison(config: RunConfig, summaries: Sequence[Summary]) -> Comparison:
    """Report on the runs in config.run_dir/METHOD: files, W&B, the table on standard output. For global rank 0."""
    run_dir = Path(config.run_dir)
    metrics = [read_metrics(run_dir / summary.method / METRICS_FILE) for summary in summaries]
    comparison = write_report(run_dir, summaries, metrics, describe_environment())
    with open_wandb(
        config.track, run_dir, asdict(config), name=f"compare-{config.model.name}", global_rank=0
    ) as tracker:
        tracker.log_report(comparison.columns, comparison.cells, comparison.plots)
        tracker.log_summary({summary.method: asdict(summary) for summary in summaries})
    print(f"\n{render_table(comparison)}\n{run_dir / 'report.md'}", flush=True)
    return comparison


def write_report(
    directory: Path,
    summaries: Sequence[Summary],
    metrics: Sequence[Sequence[Mapping[str, Any]]],
    environment: Mapping[str, Any],
) -> Comparison:
    """Compare runs of one setup; `metrics[i]` are the lines of run i's metrics.jsonl. For one process.

    ValueError where the runs are not comparable.
    """
    check_comparable(summaries)
    plots = _draw_plots(directory, summaries, metrics)
    comparison = Comparison(summaries=list(summaries), rows=build_rows(summaries), plots=plots)
    write_text(directory / "report.json", format_json(_to_json(comparison, environment)))
    write_text(directory / "report.md", _to_markdown(comparison, environment))
    return comparison


def render_table(comparison: Comparison) -> str:
    """Aligned text of at most 100 columns; where the methods do not fit beside each other, one block after another."""
    summaries, blocks, first = comparison.summaries, [], 0
    while first < len(summaries):
        count = len(summaries) - first
        while count > 1 and len(_render_block(comparison, first, count)[0]) > _MAX_COLUMNS:
            count -= 1
        blocks.append("\n".join(line.rstrip() for line in _render_block(comparison, first, count)))
        first += count
    notes = [*_list_notes(summaries), *PAPER_NOTES]
    return "\n\n".join([*blocks, "\n".join(line for note in notes for line in _wrap(note))]) + "\n"


def _render_block(comparison: Comparison, first: int, count: int) -> list[str]:
    """Methods `first` to `first + count`, with the ratio where they are all; every line padded to the same width."""
    ratio = _ratio_column(comparison.summaries) if count == len(comparison.summaries) else []
    header = ["", *[summary.method for summary in comparison.summaries[first : first + count]], *ratio]
    lines = [
        [row.label, *row.values[first : first + count], *([row.ratio] if ratio else [])] for row in comparison.rows
    ]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *lines]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _wrap(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > _MAX_COLUMNS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _ratio_column(summaries: Sequence[Summary]) -> list[str]:
    methods = [summary.method for summary in summaries]
    return [f"{methods[0]} : {BASELINE}"] if BASELINE in methods[1:] else []


def _list_notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader must know to read the numbers."""
    setup, timed = summaries[0].setup, [summary.throughput for summary in summaries]
    split = " with sequence parallelism" if setup.sequence_parallel else ""
    split += f", cp {setup.cp_size}" if setup.cp_size > 1 else ""
    recompute = " / ".join(dict.fromkeys(summary.setup.recompute for summary in summaries))
    notes = [
        f"{summaries[0].model} on {setup.world_size} {setup.device} processes: tp {setup.tp_size}{split}, pp"
        f" {setup.pp_size}, dp {setup.dp_size}, ZeRO {setup.zero_stage}, {setup.dtype}, recompute {recompute},"
        f" {setup.num_microbatches} x {setup.micro_batch_size} rows of {setup.seq_len} a replica and step."
    ]
    notes += [f"{summary.method}: {summary.setup.adapters}." for summary in summaries if summary.setup.adapters]
    if all(one is not None for one in timed):
        counts = ", ".join(f"{one.num_timed_steps} after {one.num_warmup_steps}" for one in timed if one is not None)
        notes.append(f"Rates and times are medians [quartiles] over the steps after the warm-up ({counts}).")
    notes.append(
        f"Memory is {name_memory(summaries)} of the process with the highest peak; each line of the ledger is the"
        " largest over the processes, read off the tensors in one step of its own."
    )
    if setup.device == "cpu":
        notes.append("The resident set holds the interpreter and the libraries too: compare the ledger.")
    return notes


def _draw_plots(
    directory: Path, summaries: Sequence[Summary], metrics: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Path]:
    curves = []
    for index, (summary, lines) in enumerate(zip(summaries, metrics, strict=True)):
        for key, dashed in (("loss", False), ("valid_loss", True)):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                label = f"{summary.method}, {'validation' if dashed else 'training'}"
                curves.append(Curve(label=label, xs=xs, ys=ys, color=index, dashed=dashed))
    stacks = {
        summary.method: {part: size / _MIB for part, size in summary.ledger_bytes.items() if size is not None}
        for summary in summaries
        if sum_ledger(summary.ledger_bytes) is not None
    }
    plots = [
        save_curves(
            directory / "loss.png", title="Loss a target token", xlabel="step", ylabel="cross-entropy", curves=curves
        ),
    ]
    if stacks:
        title = "Byte ledger of one process"
        plots.append(save_bars(directory / "memory.png", title=title, ylabel="MiB", stacks=stacks))
    bars = {
        summary.method: {
            "all tokens": _triple(summary.throughput.tokens_per_sec_per_gpu),
            "target tokens": _triple(summary.throughput.loss_tokens_per_sec_per_gpu),
        }
        for summary in summaries
        if summary.throughput is not None
    }
    if bars:
        title = "Throughput, median and quartiles"
        ylabel = "tokens/s per GPU" if summaries[0].setup.device == "cuda" else "tokens/s per process"
        plots.append(save_spread_bars(directory / "throughput.png", title=title, ylabel=ylabel, bars=bars))
    return plots


def _triple(spread: Any) -> tuple[float, float, float]:
    return spread.median, spread.p25, spread.p75


def _to_json(comparison: Comparison, environment: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "methods": {summary.method: asdict(summary) for summary in comparison.summaries},
        "table": {"columns": comparison.columns, "rows": comparison.cells},
        "plots": [plot.name for plot in comparison.plots],
        "notes": [*_list_notes(comparison.summaries), *PAPER_NOTES],
        "environment": dict(environment),
    }


def _to_markdown(comparison: Comparison, environment: Mapping[str, Any]) -> str:
    columns = comparison.columns
    cells = comparison.cells
    lines = [
        f"# {comparison.summaries[0].model}: {' and '.join(summary.method for summary in comparison.summaries)}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join([':--', *['--:'] * (len(columns) - 2), ':--'])}|",
        *[f"| {' | '.join(cell.strip() for cell in line)} |" for line in cells],
        "",
        *[f"- {note}" for note in [*_list_notes(comparison.summaries), *PAPER_NOTES]],
        *[f"- {note}" for note in _list_environment(environment)],
        "",
        *[f"![{plot.stem}]({plot.name})" for plot in comparison.plots],
    ]
    return "\n".join(lines) + "\n"


def _list_environment(environment: Mapping[str, Any]) -> list[str]:
    """Hardware, versions and commit out of `environment.describe_environment`."""
    notes = []
    gpus, cpu = environment.get("gpus"), environment.get("cpu")
    if gpus:
        notes.append(f"GPUs: {len(gpus['devices'])} x {gpus['devices'][0]['name']}, driver {gpus['driver']}.")
    if cpu:
        notes.append(f"CPU: {cpu['model']}, {cpu['num_usable_cores']} cores, {cpu['memory_gib']} GiB.")
    versions = [f"{name} {version}" for name, version in environment.get("versions", {}).items() if version]
    if versions:
        notes.append(f"Versions: {', '.join(versions)}.")
    git = environment.get("git")
    if git:
        notes.append(f"Commit: {git['commit']}{' with local changes' if git['dirty'] else ''}.")
    return notes
