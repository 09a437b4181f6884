"""The command line's `key=value` as a user means them, made into what Hydra reads the same way.

Hydra takes `1e3` for a number, `true` for a truth value and `${...}` for a reference wherever they stand. Here a key
whose type is text gets the text that was typed, and so does each element of a list of texts.
"""

import os
import re
from collections.abc import Sequence

from lora_dist.cli.schema import list_groups, list_keys

_VERBATIM = ("generate.prompt", "generate.system", "data.system", "system")
"""Keys of what people say: nothing in it is a reference."""
_QUOTED = re.compile(r"""(['"])((?:\\.|(?!\1).)*)\1""", re.DOTALL)
_HOME_IN_LIST = re.compile(r"((?:^\[|,)\s*)~(?=[/,\]])")
_ELEMENT = re.compile(r"""(?:\\.|\$\{[^}]*\}|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,])+""", re.DOTALL)
"""Between the commas of a list."""
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
"""What Hydra takes as it stands after a backslash, outside quotes."""


def write_override(override: str, owner: type) -> str:
    """`override` for Hydra, of the dataclass `owner`."""
    key, _, value = override.partition("=")
    known = {one.path: one for one in list_keys(owner)}
    if any(f"{key}.".startswith(f"{one.path}.") for one in known.values() if one.is_dictionary):
        return f"++{override}"  # `compare.lr.full=1e-4` adds an entry to a dictionary
    if key in known and known[key].type.startswith("list"):
        home = os.path.expanduser("~")
        value = _HOME_IN_LIST.sub(lambda found: found[1] + home, value)
        is_texts = known[key].type.startswith("list[str]") and value[:1] == "[" and value[-1:] == "]"
        return f"{key}={_write_texts(value) if is_texts else value}"
    is_text = key in known and known[key].type in ("str", "str | None") and key not in list_groups(owner=owner)
    if not is_text or value == "null":
        return override
    return f"{key}={_write_text(value, is_verbatim=key in _VERBATIM)}"


def find_written(written: str, overrides: Sequence[str], owner: type) -> str:
    """What the user typed for `written`, which Hydra names."""
    typed = {write_override(override, owner): override for override in overrides}
    return typed.get(written, written)


def _write_text(value: str, *, is_verbatim: bool) -> str:
    quoted = _QUOTED.fullmatch(value)
    text = quoted[2].replace(f"\\{quoted[1]}", quoted[1]) if quoted else value
    if is_verbatim:
        return _quote(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text))
    if text == "~" or text.startswith("~/"):
        return _quote(os.path.expanduser(text))
    return value if quoted or "${" in value else _quote(value)


def _write_texts(value: str) -> str:
    return f"[{_ELEMENT.sub(lambda found: _write_element(found[0]), value[1:-1])}]"


def _write_element(text: str) -> str:
    """In quotes, but where it has quotes, brackets or a reference of its own."""
    plain = _ESCAPED.sub("_", text)
    if not plain.strip() or set(plain) & set("[]{}'\""):
        return text
    element = text[: len(text) - len(plain) + len(plain.rstrip())].lstrip()  # a blank after a backslash stays
    return _quote(_ESCAPED.sub(r"\1", element))


def _quote(text: str) -> str:
    """In Hydra's single quotes: backslashes count before a quote alone."""
    inner = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    trailing = len(inner) - len(inner.rstrip("\\"))
    return f"'{inner}{chr(92) * trailing}'"
