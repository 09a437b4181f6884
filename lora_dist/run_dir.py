"""The run directory: who may write there, and the configuration written there. Standard library and YAML only."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dist.classify_config import ClassifyConfig
from lora_dist.config import RunConfig
from lora_dist.writing import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILE = "config.yaml"
CLAIM_FILE = ".claim.json"
"""Which run began there last (claim.py)."""
_ADAPTER = "adapter"
_MODEL = "model"


def check_run_dir(run_dir: Path, resume: str) -> None:
    """ValueError, with the remedy, where a run must not write to `run_dir`. Touches nothing.

    One process calls it, before any other can have made the directory.
    """
    if not run_dir.exists():
        _check_parent(run_dir)
        contents = []
    elif not run_dir.is_dir():
        raise ValueError(f"run_dir={run_dir} is not a directory; give another run_dir")
    else:
        for path in (run_dir, run_dir / "checkpoints", run_dir / "metrics.jsonl"):
            if path.exists():
                _check_writable(path, run_dir)
        contents = sorted(entry.name for entry in run_dir.iterdir() if entry.name != CLAIM_FILE)
    if contents == [CONFIG_FILE] and resume != "must":
        return  # of a run that was refused before it had done anything
    if contents and resume == "none":
        raise ValueError(
            f"run_dir={run_dir} is not empty ({contents[0]}, ...); continue that run with resume=auto,"
            " or give another run_dir"
        )
    if contents and CONFIG_FILE not in contents:
        raise ValueError(f"run_dir={run_dir} holds no {CONFIG_FILE}, so it is no run to resume; give another run_dir")
    if resume == "must" and not any(run_dir.glob("**/checkpoints/*")):
        raise ValueError(f"resume=must, but run_dir={run_dir} holds no checkpoint; start fresh with resume=none")


def prepare_run_dir(config: RunConfig | ClassifyConfig) -> Path:
    """Check and make config.run_dir, with config.yaml where there is none. Global rank 0 alone calls it.

    That of a run that goes on stays until the run has been found to be the same: `write_config`.
    """
    run_dir = Path(config.run_dir)
    check_run_dir(run_dir, config.resume)
    if config.resume == "none" or not (run_dir / CONFIG_FILE).exists():
        write_config(config)
    return run_dir


def write_config(config: RunConfig | ClassifyConfig) -> None:
    """config.yaml, in its directory. Global rank 0 alone calls it."""
    run_dir = Path(config.run_dir)
    try:
        write_text(run_dir / CONFIG_FILE, format_config(config))
    except OSError as error:
        if error.errno is None:  # there is no room, and that is said with the remedy
            raise
        raise ValueError(f"run_dir={run_dir} cannot be written: {error.strerror}; give another run_dir") from error


def format_config(config: "DataclassInstance") -> str:
    """The whole configuration as YAML, with nothing left to resolve."""
    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def name_trained(config: RunConfig | ClassifyConfig, *, best: bool = False) -> Path:
    """What a run hands on: `adapter/`, or `model/` where everything trained; its best validation's with `best_`."""
    return Path(config.run_dir) / f"{'best_' if best else ''}{_MODEL if config.method == 'full' else _ADAPTER}"


def find_adapter(directory: str) -> str:
    """The adapter's own directory, given that or the run's that wrote it (a comparison's, too)."""
    for inside in (_ADAPTER, f"lora/{_ADAPTER}"):
        if (Path(directory) / inside).is_dir():
            return str(Path(directory) / inside)
    return directory


def find_run(adapter: str) -> Path | None:
    """The directory of the run that ended with an adapter (`find_adapter` gives its own); None where none did.

    Scores and texts of `best_adapter/` stay beside it: those in the run's directory are its last adapter's.
    """
    parent = Path(adapter).parent
    return parent if Path(adapter).name == _ADAPTER and (parent / CONFIG_FILE).is_file() else None


def find_trainer(trained: str | None) -> Path | None:
    """The run that wrote an adapter or a whole model, its last or its best; None where none did."""
    directory = Path(trained or "").resolve()
    names = (_ADAPTER, _MODEL, f"best_{_ADAPTER}", f"best_{_MODEL}")
    return directory.parent if directory.name in names and (directory.parent / CONFIG_FILE).is_file() else None


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's configuration as it was written. ValueError where that is damaged."""
    path = run_dir / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no configuration")
    return content


def _check_parent(run_dir: Path) -> None:
    parent = next(path for path in run_dir.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"run_dir={run_dir} cannot be made: {parent} is not a directory; give another run_dir")
    _check_writable(parent, run_dir)


def _check_writable(path: Path, run_dir: Path) -> None:
    if not os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK):
        raise ValueError(f"run_dir={run_dir} cannot be written: no permission in {path}; give another run_dir")
