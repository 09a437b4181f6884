"""The adapters below a directory as a table; each one's files are checked against its manifest on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_dist.checkpoint.method_store import METHOD_KIND
from lora_dist.checkpoint.store import FACTORS, PEFT_CONFIG, PEFT_WEIGHTS
from lora_dist.files.directories import MANIFEST, read_json, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRow:
    """One line of the table."""

    adapter: str
    """Directory."""
    task: str
    rank: str
    targets: str
    """And before them the method, where that is not LoRA alone."""
    size: str
    base: str
    date: str
    metric: str
    state: str
    """whole, or what is wrong."""


def list_adapters(directory: Path) -> list[AdapterRow]:
    """Every adapter of the store below `directory`, and PEFT's from elsewhere; ValueError where that is none."""
    if not directory.is_dir():
        raise ValueError(f"directory={directory} is not a directory")
    candidates = {path.parent for name in (MANIFEST, PEFT_CONFIG) for path in directory.rglob(name)}
    visible = [path for path in sorted(candidates) if not path.name.startswith(".")]
    rows = [_describe(path) for path in visible]
    return [row for row in rows if row is not None]


def format_table(rows: Sequence[AdapterRow]) -> str:
    """Columns as wide as their widest cell."""
    cells = [tuple(field.name for field in fields(AdapterRow)), *(astuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _describe(path: Path) -> AdapterRow | None:
    """None for a directory whose manifest is of something else."""
    manifest, state = _read(path)
    if manifest is None:
        return None
    adapters = manifest.get("adapters")
    adapters = adapters if isinstance(adapters, dict) else {}
    return AdapterRow(
        adapter=str(path),
        task=str(manifest.get("task", "")),
        rank=_describe_ranks(adapters),
        targets=f"{manifest.get('method', '')} {_describe_targets(adapters)}".strip(),
        size=_describe_size(path),
        base=_describe_base(manifest),
        date=str(manifest.get("created", ""))[:16].replace("T", " "),
        metric=_describe_metric(manifest.get("metrics")),
        state=state,
    )


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest and the state; None for a manifest that is no adapter's."""
    if not (path / MANIFEST).exists():
        return {}, "from elsewhere: import it"
    manifest: dict[str, Any] = {}
    try:
        manifest = read_json(path / MANIFEST)
        if "adapters" not in manifest and manifest.get("kind") != METHOD_KIND:
            return None, ""
        read_manifest(path)
        _check_finite(path)
    except ValueError as error:
        return manifest, str(error)
    return manifest, "whole"


def _check_finite(path: Path) -> None:
    for name in (PEFT_WEIGHTS, FACTORS):
        if (path / name).is_file():
            for key, tensor in load_file(path / name).items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name}: {key} is not finite")


def _describe_ranks(adapters: Mapping[str, Any]) -> str:
    """`4`, or `1-8` where they differ."""
    ranks = {entry.get("lora_rank") for entry in adapters.values() if isinstance(entry, dict)}
    known = sorted(rank for rank in ranks if isinstance(rank, int))
    return "-".join(map(str, dict.fromkeys([known[0], known[-1]]))) if known else ""


def _describe_targets(adapters: Mapping[str, Any]) -> str:
    """`q,v` of the names `layers.0.q_proj`, in the order in which they first come."""
    return ",".join(dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in adapters))


def _describe_size(path: Path) -> str:
    sizes = [(path / name).stat().st_size for name in (PEFT_WEIGHTS, FACTORS) if (path / name).is_file()]
    return f"{sum(sizes) / 1e6:.2f} MB"


def _describe_base(manifest: Mapping[str, Any]) -> str:
    fingerprint = str(manifest.get("base_fingerprint", "")).rpartition(":")[2][:8]
    return f"{manifest.get('base', '')} {fingerprint}".strip()


def _describe_metric(metrics: object) -> str:
    """The first that has a value."""
    known = {key: value for key, value in metrics.items() if value is not None} if isinstance(metrics, dict) else {}
    return next((f"{key} {value:.4g}" for key, value in known.items()), "")
