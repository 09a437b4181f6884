"""The comparison's rows: what is compared, in which words and units, and the paper's figures beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_dist.measure.memory import LABELS
from lora_dist.measure.meter import Spread, ThroughputSummary
from lora_dist.measure.summary import Summary

BASELINE = "full"
"""The method that the others are set against, where it ran."""
MISSING = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the report."""

    label: str
    values: list[str]
    """One a method."""
    ratio: str
    """First method to the baseline; MISSING where one was not measured, empty where it says nothing."""
    paper: str
    """LoRA to full fine-tuning of GPT-3 175B in the paper, where it has the figure."""


Value = float | int | None
Format = Callable[[float], str]


def build_rows(summaries: Sequence[Summary]) -> list[Row]:
    """Every line, in order; the methods in the order of `summaries`."""
    return [
        *_build_size_rows(summaries),
        *_build_memory_rows(summaries),
        *_build_speed_rows(summaries),
        *_build_loss_rows(summaries),
    ]


def _build_size_rows(summaries: Sequence[Summary]) -> Iterator[Row]:
    trainable = [summary.num_trainable_parameters for summary in summaries]
    yield _row("trainable parameters", summaries, trainable, "{:,.0f}".format, paper="10,000x fewer")
    yield _row(
        "share of the base model", summaries, [s.trainable_ratio for s in summaries], "{:.3%}".format, ratio=False
    )
    yield _row("optimizer state, all processes", summaries, [s.optimizer_state_bytes for s in summaries], format_bytes)
    per_process = [summary.optimizer_state_bytes_per_process for summary in summaries]
    yield _row("optimizer state, one process", summaries, per_process, format_bytes)
    checkpoints = [summary.checkpoint_bytes for summary in summaries]
    yield _row("checkpoint files", summaries, checkpoints, format_bytes, paper="350 GB -> 35 MB")


def _build_memory_rows(summaries: Sequence[Summary]) -> Iterator[Row]:
    label = name_memory(summaries)
    memory = [summary.peak_memory for summary in summaries]
    peaks = [None if one is None else one.peak_bytes for one in memory]
    yield _row(f"{label}, one process", summaries, peaks, format_bytes, paper="1.2 TB -> 350 GB, all GPUs")
    if label == LABELS["cuda"]:
        reserved = [None if one is None else one.reserved_bytes for one in memory]
        yield _row("CUDA reserved, one process", summaries, reserved, format_bytes)
    else:
        at_reset = [None if one is None else one.at_reset_bytes for one in memory]
        yield _row("  of it before the run began", summaries, at_reset, format_bytes, ratio=False)
    ledgers = [summary.ledger_bytes for summary in summaries]
    for part in ledgers[0]:
        yield _row(f"ledger: {part}", summaries, [ledger[part] for ledger in ledgers], format_bytes)
    yield _row("ledger: sum", summaries, [sum_ledger(ledger) for ledger in ledgers], format_bytes)


def name_memory(summaries: Sequence[Summary]) -> str:
    """How reports name the peak that these runs measured."""
    unmeasured = "cuda" if summaries[0].setup.device == "cuda" else "rss"
    methods = [summary.peak_memory.method for summary in summaries if summary.peak_memory is not None]
    return LABELS[[*methods, unmeasured][0]]


def sum_ledger(ledger: Mapping[str, int | None]) -> int | None:
    """None where a line was not measured."""
    sizes = [size for size in ledger.values() if size is not None]
    return sum(sizes) if len(sizes) == len(ledger) else None


def _build_speed_rows(summaries: Sequence[Summary]) -> Iterator[Row]:
    timed = [summary.throughput for summary in summaries]
    per = "GPU" if summaries[0].setup.device == "cuda" else "process"
    yield _spread_row(
        f"tokens/s per {per}", summaries, timed, lambda t: t.tokens_per_sec_per_gpu, "32.5 -> 43.1 per V100"
    )
    yield _spread_row(f"target tokens/s per {per}", summaries, timed, lambda t: t.loss_tokens_per_sec_per_gpu)
    yield _spread_row("step time, ms", summaries, timed, lambda t: t.step_time_ms)
    cpu = [summary.cpu_seconds_per_step for summary in summaries]
    yield _row("CPU seconds a step, all processes", summaries, cpu, "{:.3f}".format)
    tokens = [None if one is None else one.tokens_per_step for one in timed]
    yield _row("tokens a step", summaries, tokens, "{:,.0f}".format, ratio=False)
    yield _row("FLOPs a step", summaries, [s.flops_per_step for s in summaries], "{:.4g}".format)
    collectives = [summary.tp_collectives_per_layer for summary in summaries]
    yield _row("TP collectives a layer, microbatch", summaries, collectives, "{:.2f}".format, ratio=False)


def _build_loss_rows(summaries: Sequence[Summary]) -> Iterator[Row]:
    losses = [("before", [s.valid_loss_before for s in summaries]), ("after", [s.valid_loss_after for s in summaries])]
    for when, values in losses:
        yield _row(f"validation loss {when}", summaries, values, "{:.4f}".format, ratio=False)
    yield _row("learning rate", summaries, [summary.setup.lr for summary in summaries], "{:g}".format, ratio=False)
    yield _row("steps", summaries, [summary.num_steps for summary in summaries], "{:,.0f}".format, ratio=False)


def _row(
    label: str,
    summaries: Sequence[Summary],
    values: Sequence[Value],
    show: Format,
    *,
    ratio: bool = True,
    paper: str = "",
) -> Row:
    return Row(
        label=label,
        values=[MISSING if value is None else show(value) for value in values],
        ratio=_format_ratio(summaries, values) if ratio else "",
        paper=paper,
    )


def _spread_row(
    label: str,
    summaries: Sequence[Summary],
    timed: Sequence[ThroughputSummary | None],
    pick: Callable[[ThroughputSummary], Spread],
    paper: str = "",
) -> Row:
    """Median and, in brackets, the quartiles."""
    spreads = [None if one is None else pick(one) for one in timed]
    return Row(
        label=label,
        values=[MISSING if spread is None else _format_spread(spread) for spread in spreads],
        ratio=_format_ratio(summaries, [None if spread is None else spread.median for spread in spreads]),
        paper=paper,
    )


def _format_spread(spread: Spread) -> str:
    median, p25, p75 = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in _list_quartiles(spread))
    return f"{median} [{p25}-{p75}]"


def _list_quartiles(spread: Spread) -> tuple[float, float, float]:
    return spread.median, spread.p25, spread.p75


def _format_ratio(summaries: Sequence[Summary], values: Sequence[Value]) -> str:
    """First method over the baseline: 1.45x, or 1/170 where it is far below one."""
    methods = [summary.method for summary in summaries]
    if BASELINE not in methods[1:]:
        return ""
    first, baseline = values[0], values[methods.index(BASELINE)]
    if first is None or baseline is None:
        return MISSING
    if not first or not baseline:
        return ""
    quotient = first / baseline
    return f"{quotient:.2f}x" if quotient >= 0.1 else f"1/{1 / quotient:,.0f}"


def format_bytes(size: float) -> str:
    """With three or four digits in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
