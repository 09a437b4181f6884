"""`lora-dist VERB [key=value ...]`: read the command line, refuse what cannot run, run the verb."""

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lora_dist.cli import bench, compare, plan, preflight, train
from lora_dist.cli.adapter_verbs import ADAPTER_VERBS, AdapterVerb, run_adapter_verb
from lora_dist.cli.help import describe_verb, describe_verbs
from lora_dist.cli.inputs import check_checkpoint, check_inputs, list_methods
from lora_dist.cli.launch import (
    USER_ERROR,
    describe_error,
    end_with_launcher,
    launch_local,
    record_failure,
    tell_stopped,
)
from lora_dist.cli.ranks import adopt_ranks, become_single_process, get_job_id, name_node
from lora_dist.config import RunConfig
from lora_dist.run_dir import check_run_dir, format_config
from lora_dist.stopping import Stopped, end_at_next_interrupt, load_torch, note_stop_requests


class Verb(Protocol):
    """A module of cli/: its first line is the summary, `run` does the work on every process."""

    __doc__: str | None

    def run(self, config: RunConfig) -> None: ...


VERBS: dict[str, Verb] = {
    "train": train,
    "compare": compare,
    "plan": plan,
    "preflight": preflight,
    "bench": bench,
}
ON_PAPER = ("plan",)
"""Verbs that describe a job instead of running it: in one process, and without its files."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can mend (one line on stderr), 75 stopped as asked, 130 on Ctrl-C."""
    note_stop_requests()
    try:
        end_with_launcher()
        words = list(sys.argv[1:] if argv is None else argv)
        # DeepSpeed's launcher puts the local rank in front, which LOCAL_RANK says as well.
        return _dispatch([word for word in words if not re.fullmatch(r"--local[_-]rank=\d+", word)])
    except KeyboardInterrupt:
        end_at_next_interrupt()
        return 130
    except Stopped:
        return tell_stopped(os.environ)
    except Exception as error:
        printed_by_launcher = record_failure(error)
        if not isinstance(error, ValueError | OSError) or "LORA_DIST_TRACEBACK" in os.environ:
            raise
        if not printed_by_launcher:
            print(f"error: {name_node(os.environ)}{describe_error(error)}", file=sys.stderr)
        return USER_ERROR


def _dispatch(words: list[str]) -> int:
    modules: dict[str, Verb | AdapterVerb] = {**VERBS, **ADAPTER_VERBS}
    summaries = {name: (module.__doc__ or "").partition("\n")[0] for name, module in modules.items()}
    if not words or words[0] in ("-h", "--help"):
        return _print(describe_verbs(summaries))
    verb, *rest = words
    if verb not in modules:
        alike = difflib.get_close_matches(verb, modules, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"verbs are {', '.join(modules)}"
        raise ValueError(f"unknown verb {verb}; {hint}")
    owner = ADAPTER_VERBS[verb].CONFIG if verb in ADAPTER_VERBS else RunConfig
    if "-h" in rest or "--help" in rest:
        return _print(describe_verb(verb, summaries[verb], owner))
    only_print, overrides = _take_cfg_option(rest)
    for word in overrides:
        if word.startswith("-"):
            raise ValueError(f"unknown option {word}; options are --help and --cfg job")
    if only_print:
        return _print_config(overrides, owner, on_paper=verb in ON_PAPER)
    return run_adapter_verb(verb, overrides) if verb in ADAPTER_VERBS else _run(verb, overrides)


def _take_cfg_option(words: list[str]) -> tuple[bool, list[str]]:
    """Whether `--cfg job` (or `-c job`) is among the words, and the words without it."""
    for option in ("--cfg", "-c"):
        if option in words:
            at = words.index(option)
            what = words[at + 1] if at + 1 < len(words) else ""
            if what != "job":
                raise ValueError(f"{option} {what}: write {option} job")
            return True, words[:at] + words[at + 2 :]
    return False, words


def _print_config(overrides: list[str], owner: type, *, on_paper: bool) -> int:
    from lora_dist.cli.compose import compose_as

    return _print(format_config(compose_as(owner, overrides, on_paper=on_paper)).rstrip("\n"))


def _print(text: str) -> int:
    """To a reader who may stop reading (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(verb: str, overrides: list[str]) -> int:
    """Check, then run the verb here, or on local processes where the topology wants several and no launcher is ours."""
    from lora_dist.cli.compose import compose_config

    if verb in ON_PAPER:
        return _run_on_paper(verb, overrides)
    config = compose_config(overrides)
    given_world_size = adopt_ranks(os.environ)
    if config.run_dir == "auto":
        run_dir = name_run_dir(verb, config, overrides, os.environ)
        config = replace(config, run_dir=run_dir)
        overrides = [*overrides, f"run_dir={json.dumps(run_dir, ensure_ascii=False)}"]
    topology = config.topology
    world_size = given_world_size or topology.num_processes
    check_inputs(config, world_size, list_methods(verb, config))
    if given_world_size is None or os.environ["RANK"] == "0":
        check_run_dir(Path(config.run_dir), config.resume)
        check_checkpoint(config.model)
    if given_world_size is None and world_size > 1:
        return launch_local(verb, overrides, world_size)
    if given_world_size is None:
        become_single_process(os.environ)
    VERBS[verb].run(config)
    return 0


def _run_on_paper(verb: str, overrides: list[str]) -> int:
    from lora_dist.cli.compose import compose_config

    config = compose_config(overrides, on_paper=True)
    if config.run_dir == "auto":
        config = replace(config, run_dir=name_run_dir(verb, config, overrides, {}))
    check_run_dir(Path(config.run_dir), config.resume)
    load_torch()
    VERBS[verb].run(config)
    return 0


def name_run_dir(verb: str, config: RunConfig, overrides: Sequence[str], environ: Mapping[str, str]) -> str:
    """`run_dir=auto`: `runs/VERB-NAME-ID`, the same on every process of a job; ID is the time when started bare.

    ValueError where the processes share no ID, or where a run to resume would be a new one.
    """
    experiments = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    name = (experiments[-1] if experiments else config.model.name).replace("/", "-")
    started_bare = "WORLD_SIZE" not in environ
    job_id = time.strftime("%Y%m%d-%H%M%S") if started_bare else get_job_id(environ)
    if job_id is None:
        raise ValueError("run_dir=auto: the processes of this launcher share no job id; give run_dir=DIR")
    if started_bare and config.resume != "none":
        raise ValueError(f"resume={config.resume} with run_dir=auto would start a new run; give run_dir=DIR")
    return f"runs/{verb}-{name}-{job_id}"


if __name__ == "__main__":
    sys.exit(main())
