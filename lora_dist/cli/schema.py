"""What there is to configure, read from lora_dist/config.py and conf/ without Hydra."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import lora_dist
from lora_dist import config

CONF_DIR = Path(lora_dist.__file__).resolve().parents[1] / "conf"
_PARTS_OF_RUNS = {"method", "experiment", "debug"}
"""Groups of conf/ that set keys of the whole run."""
ASSETS_DIR = Path(lora_dist.__file__).resolve().parent / "assets"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One leaf of RunConfig."""

    path: str
    """Dotted, as written on the command line: `lora.rank`."""
    type: str
    doc: str
    is_dictionary: bool


@cache
def list_keys(owner: type = config.RunConfig) -> tuple[Key, ...]:
    """Every leaf, in the order of the dataclasses."""
    return tuple(_iterate_keys(owner, ""))


def _iterate_keys(owner: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(owner)
    docs = _read_field_docs(owner)
    for field in fields(owner):
        kind = _unwrap_optional(hints[field.name])
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _iterate_keys(kind, f"{prefix}{field.name}.")
            continue
        yield Key(
            path=prefix + field.name,
            type=kind.__name__ if isinstance(kind, type) and not get_origin(kind) else str(kind),
            doc=docs.get(field.name, ""),
            is_dictionary=get_origin(kind) is dict,
        )


def _unwrap_optional(kind: object) -> object:
    """`HardwareConfig | None` -> HardwareConfig, whose keys exist wherever a file of its group is picked."""
    inner = [arg for arg in get_args(kind) if arg is not type(None)]
    return inner[0] if len(inner) == 1 and is_dataclass(inner[0]) else kind


def list_groups(conf_dir: Path = CONF_DIR, owner: type = config.RunConfig) -> dict[str, list[str]]:
    """Options of each configuration group that `owner` has: `model` -> [demo, gpt2_small, ...]."""
    groups: dict[str, list[str]] = {}
    hints = get_type_hints(owner)
    own_groups = {field.name for field in fields(owner) if is_dataclass(_unwrap_optional(hints[field.name]))}
    for directory in sorted(path for path in conf_dir.iterdir() if path.is_dir()):
        if directory.name not in own_groups | (_PARTS_OF_RUNS if owner is config.RunConfig else set()):
            continue
        files = sorted(directory.rglob("*.yaml"))
        groups[directory.name] = [str(file.relative_to(directory).with_suffix("")) for file in files]
    return groups


def _read_field_docs(owner: type) -> dict[str, str]:
    """The string under each field, which Python itself forgets."""
    docs = {}
    for base in owner.__bases__:
        docs.update(_read_field_docs(base) if is_dataclass(base) else {})
    (definition,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = inspect.cleandoc(below.value.value).replace("\n", " ")
    return docs
