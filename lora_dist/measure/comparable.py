"""Which runs may stand beside each other in one report: asked before any of them trains, and when it is written."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_dist.config import RunConfig
from lora_dist.files.directories import read_json
from lora_dist.measure.summary import SUMMARY_FILE, Setup, Summary, describe_setup
from lora_dist.run_dir import read_run
from lora_dist.topology import Topology

_MAY_DIFFER = ("lr", "adapters", "recompute")
"""Of a setup, between runs that are compared; memory may allow one of them less recomputation."""


def check_comparable(summaries: Sequence[Summary]) -> None:
    """ValueError where topology, ZeRO stage, dtype, batches or model differ: the ratio would say nothing."""
    first = summaries[0]
    for other in summaries[1:]:
        if differing := _list_differences(first.model, first.setup, other.model, other.setup):
            raise ValueError(_format_refusal(first.method, other.method, differing))


def check_before_training(configs: Sequence[RunConfig], topology: Topology) -> None:
    """ValueError, with the remedy, where `check_comparable` would refuse these runs once all have trained.

    A run that has no step left keeps the setup it was trained in; the others will have the one `configs` ask for.
    Global rank 0 alone calls it.
    """
    finished = [_read_finished(config) for config in configs]
    runs = [
        (config.model.name, describe_setup(config, topology)) if summary is None else (summary.model, summary.setup)
        for config, summary in zip(configs, finished, strict=True)
    ]
    for config, summary, run in zip(configs, finished, runs, strict=True):
        differing = _list_differences(*runs[0], *run)
        if not differing:
            continue
        over, where = (config.method, config.run_dir) if summary else (configs[0].method, configs[0].run_dir)
        raise ValueError(
            f"{_format_refusal(configs[0].method, config.method, differing)}; {over} is finished: give the settings it"
            f" was trained with, or remove {where}, or give another run_dir"
        )


def _read_finished(config: RunConfig) -> Summary | None:
    """The summary in config.run_dir, where it stands because no step is left."""
    path = Path(config.run_dir) / SUMMARY_FILE
    if not path.exists():
        return None
    if config.loop.num_epochs is None:
        over = read_json(path).get("num_steps", 0) >= config.loop.total_steps
    else:  # how many steps these are is known only once the data has been read
        over = (read_run(path.parent)["loop"]["num_epochs"] or 0) >= config.loop.num_epochs
    return Summary.read(path) if over else None


def _list_differences(model: str, setup: Setup, other_model: str, other_setup: Setup) -> list[str]:
    ours, theirs = asdict(setup), asdict(other_setup)
    differing = [key for key in ours if key not in _MAY_DIFFER and ours[key] != theirs[key]]
    values = [f"{key} {ours[key]} / {theirs[key]}" for key in differing]
    return values + ([f"model {model} / {other_model}"] if model != other_model else [])


def _format_refusal(method: str, other: str, differing: Sequence[str]) -> str:
    return f"cannot compare {method} with {other}: they differ in {', '.join(differing)}"
