"""Metrics, tables and plots to Weights & Biases from one process; whatever fails there, the run goes on.

Online with a key (WANDB_API_KEY or netrc), offline without; WANDB_MODE overrides. Online that fails falls back to
offline, offline to nothing, each said in one line on standard error. `wandb sync` uploads an offline run later.
"""

import netrc
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lora_dist.config import TrackConfig
from lora_dist.stopping import Stopped
from lora_dist.writing import write_text

RUN_ID_FILE = "wandb_run_id.txt"
_FINISH_TIMEOUT_S = 60
_GROUPS = {
    "step_time_ms": "perf",
    "tokens_per_sec_per_gpu": "perf",
    "tokens": "perf",
    "loss_tokens": "perf",
    "peak_memory_gib": "memory",
    "valid_loss": "valid",
}
"""Where a metric of metrics.jsonl appears; the others under train."""


class WandbSink:
    """Logs to one W&B run, or nowhere: `open_wandb` decides."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log_step(self, metrics: Mapping[str, float | int | bool | None]) -> None:
        """One step's metrics by their names in metrics.jsonl."""
        named = {name_metric(name): value for name, value in metrics.items() if name != "step" and value is not None}
        self._attempt("logging a step", lambda run: run.log(named, step=metrics["step"]))

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the run, shown beside its name; nested mappings are fine."""
        self._attempt("logging the summary", lambda run: run.summary.update(dict(values)))

    def log_report(self, columns: Sequence[str], rows: Sequence[Sequence[str]], plots: Sequence[Path]) -> None:
        """The comparison's table and plots."""

        self.log_table("report/table", columns, rows)

        def log(run: Any) -> None:
            import wandb

            run.log({f"report/{plot.stem}": wandb.Image(str(plot)) for plot in plots})

        self._attempt("logging the report", log)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Cells as they are shown."""

        def log(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._attempt("logging a table", log)

    def close(self, *, failed: bool = False) -> None:
        """Write everything out; an upload that does not end within a minute is left for `wandb sync`."""
        self._attempt("finishing", lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _attempt(self, what: str, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # tracking must never stop training, whatever it raises
            self._run = None
            _say(f"{what} failed ({_shorten(error)}); this run is not tracked from here on")


@contextmanager
def open_wandb(
    track: TrackConfig, run_dir: Path, config: Mapping[str, Any], *, name: str, global_rank: int
) -> Iterator[WandbSink]:
    """The sink of this process; only global rank 0 of a run with track.backend=wandb writes anything.

    `config` is the resolved configuration as plain values. Continues the run of track.run_id, or the one named in
    `run_dir`/wandb_run_id.txt. W&B shows the run as failed where the block raises anything but Stopped.
    """
    tracks = track.backend == "wandb" and global_rank == 0
    sink = WandbSink(_start(track, run_dir, config, name) if tracks else None)
    try:
        yield sink
    except BaseException as error:
        sink.close(failed=not isinstance(error, Stopped))
        raise
    sink.close()


def name_metric(name: str) -> str:
    return f"{_GROUPS.get(name, 'train')}/{name}"


def has_key() -> bool:
    """True where W&B would find a key; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: it is no text
        return False
    return any(entries.authenticators(host) for host in _list_hosts())


def _list_hosts() -> list[str]:
    """Where the key may be filed: the server's host, and W&B's first one, which its newer default stands in for."""
    import wandb

    default = wandb.Settings().base_url
    base_url = os.environ.get("WANDB_BASE_URL", default)
    return [str(urlparse(base_url).hostname), *(["api.wandb.ai"] if base_url == default else [])]


def _start(track: TrackConfig, run_dir: Path, config: Mapping[str, Any], name: str) -> Any | None:
    requested = os.environ.get("WANDB_MODE")
    try:
        mode = requested or ("online" if has_key() else "offline")
    except ImportError:
        _say("not installed; this run is not tracked (pip install wandb, or track=none)")
        return None
    except Exception as error:  # tracking must never stop training, whatever it raises
        _say(f"cannot be asked for its server ({_shorten(error)}); this run is not tracked")
        return None
    if mode == "offline":
        reason = "WANDB_MODE=offline" if requested else "no key in WANDB_API_KEY or netrc"
        runs = f"{shlex.quote(str(run_dir / 'wandb'))}/offline-run-*"
        _say(f"tracking offline ({reason}); upload later with `wandb sync {runs}`")
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return _init(track, run_dir, config, name, attempt)
        except Exception as error:  # tracking must never stop training, whatever it raises
            following = "tracking offline" if attempt != "offline" else "this run is not tracked"
            _say(f"cannot start {attempt} ({_shorten(error)}); {following}")
    return None


def _init(track: TrackConfig, run_dir: Path, config: Mapping[str, Any], name: str, mode: Any) -> Any:
    import wandb

    id_file = run_dir / RUN_ID_FILE
    run_id = track.run_id or (id_file.read_text().strip() if id_file.exists() else None)
    run = wandb.init(
        project=track.project or None,
        entity=track.entity or None,
        name=os.environ.get("WANDB_NAME") or name,
        id=run_id,
        resume="allow" if run_id and mode == "online" else None,
        dir=run_dir,
        config=dict(config),
        mode=mode,
        settings=wandb.Settings(
            init_timeout=track.init_timeout_s,
            login_timeout=track.init_timeout_s,
            finish_timeout=_FINISH_TIMEOUT_S,
            console="off",
            silent=True,
        ),
    )
    write_text(id_file, f"{run.id}\n")
    return run


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _say(message: str) -> None:
    print(f"wandb: {message}", file=sys.stderr, flush=True)
