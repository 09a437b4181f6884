"""Hydra's and OmegaConf's errors in one line: the key, the file, what exists."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from lora_dist.cli.overrides import find_written
from lora_dist.cli.schema import list_groups, list_keys

NOT_SET = "not set"
"""How the refusal of a value that the user has to give begins."""
_TYPES = {"Integer": "int", "Float": "float"}
_REWORDED = {
    r"Ambiguous value for argument": "several values; a list is written [a,b], a comma inside a text needs quotes",
    r"is not a ListConfig": "not a list; write [a,b]",
    r"is not Optional": "null is no value for it",
    r"is not a valid bool": "neither true nor false",
    r"Cannot assign \w+ to Dict\[": "entries by name, not a value; write {name: value}",
    r"is not a subclass of": "a group of keys, not a value; set one of them",
}


def explain_composition_error(error: Exception, overrides: Sequence[str], conf_dir: Path, owner: type) -> str:
    """One line for the user; `error` is what composing `overrides` over the files of `conf_dir` raised.

    `owner` is the dataclass that was composed.
    """
    text = f"{error}\n{error.__cause__ or ''}"
    if option := re.search(r"Could not find '([^']+)'", text):
        return _explain_missing_option(option.group(1), conf_dir, owner)
    if (override := getattr(error, "override", None)) is not None:
        return _explain_unreadable(find_written(override, overrides, owner))
    full_key = _find_full_key(text)
    resolved = re.search(r"raised while resolving interpolation: (.*)", text)
    if resolved and not resolved[1].startswith(NOT_SET):  # `full_key` is but the first value that was looked up there
        return resolved[1]
    place = _find_place(text, overrides, conf_dir)
    where = "" if full_key and place.startswith(f"{full_key}=") else place
    if unknown := re.search(r"Key '([^']+)' (?:not in|is not in)", text):
        full_key = full_key or unknown.group(1)
        return f"{where}unknown key {full_key}{_suggest(full_key, owner)}"
    if value := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        return f"{where}{full_key}={value.group(1)} is not of type {_TYPES.get(value.group(2), value.group(2))}"
    words = resolved[1] if resolved else _reword(text, error.__cause__ or error)
    return (place or (f"{full_key}: " if full_key else "")) + words


def _explain_unreadable(override: str) -> str:
    if override.partition("=")[2].startswith("{"):
        example = r"{layers.\[01\].q_proj: 3}"
        return f"{override}: cannot be read; put a backslash before each of []()|:, within a key, e.g. {example}"
    return f"{override}: cannot be read; put quotes inside the shell's: key='\"a value\"'"


def _explain_missing_option(option: str, conf_dir: Path, owner: type) -> str:
    group, _, name = option.partition("/")
    options = list_groups(conf_dir, owner).get(group, [])
    return f"{group}={name}: no file conf/{option}.yaml{_did_you_mean(name, options)} (there are {', '.join(options)})"


def _find_place(text: str, overrides: Sequence[str], conf_dir: Path) -> str:
    """`conf/model/x.yaml: ` where a file is at fault, the override where that is."""
    if file := re.search(r"In '([^']+)'", text):
        return f"{conf_dir.name}/{file.group(1)}.yaml: "
    named = re.search(r"(?:Could not override|merging override|for argument) '?([^\s=']+)", text)
    key = named.group(1).lstrip("+") if named else None
    written = next((override for override in reversed(overrides) if override.partition("=")[0] == key), None)
    return f"{written}: " if written else ""


def _find_full_key(text: str) -> str:
    key = re.search(r"full_key: (\S+)", text)
    return key.group(1) if key else ""


def _reword(text: str, error: BaseException) -> str:
    for pattern, words in _REWORDED.items():
        if found := re.search(pattern, text):
            return found.expand(words)
    return " ".join(str(error).split())


def _suggest(full_key: str, owner: type) -> str:
    """A key of the same name elsewhere (`rank` -> lora.rank), else one spelt alike."""
    keys = [key.path for key in list_keys(owner)]
    leaf = full_key.rpartition(".")[2]
    same_name = [key for key in keys if key.rpartition(".")[2] == leaf]
    if same_name:
        return f"; did you mean {' or '.join(same_name)}?"
    return _did_you_mean(full_key, [*keys, *list_groups(owner=owner)]) or "; the verb's --help lists its keys"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    alike = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {alike[0]}?" if alike else ""
