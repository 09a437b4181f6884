"""What `--help` prints."""

import textwrap
from collections.abc import Mapping

from lora_dist.cli.schema import list_groups, list_keys

_OPTIONS = """\
options:
  -h, --help   this text; after a verb, every group and key
  --cfg job    print the composed configuration and stop

Set LORA_DIST_TRACEBACK=1 to see where an error was raised."""


def describe_verbs(summaries: Mapping[str, str]) -> str:
    """The verbs, one line each."""
    lines = [f"  {verb:10} {summary}" for verb, summary in summaries.items()]
    return "\n".join(["usage: lora-dist VERB [key=value ...]", "", "verbs:", *lines, "", _OPTIONS])


def describe_verb(verb: str, summary: str, owner: type) -> str:
    """The configuration groups with their options, and every key with its type and meaning."""
    groups = [_wrap(f"  {group}=", ", ".join(options)) for group, options in list_groups(owner=owner).items()]
    keys = [_describe_key(key.path, key.type, key.doc) for key in list_keys(owner)]
    return "\n".join(
        [
            *(f"usage: lora-dist {verb} [key=value ...] [--cfg job]", "", summary, ""),
            *(["groups (files of conf/; pick one: model=demo):", *groups, ""] if groups else []),
            *("keys (write key=value):", *keys, "", _OPTIONS),
        ]
    )


def _describe_key(path: str, kind: str, doc: str) -> str:
    head = f"  {path:36} {kind}"
    return f"{head}\n{textwrap.indent(textwrap.fill(doc, 108), ' ' * 8)}" if doc else head


def _wrap(head: str, text: str) -> str:
    return textwrap.fill(text, 118, initial_indent=f"{head:16}", subsequent_indent=" " * 16)
