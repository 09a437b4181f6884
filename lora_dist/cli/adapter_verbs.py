"""The verbs with a configuration of their own, for adapters and for outputs: checks before the work, processes."""

import os
from collections.abc import Sequence
from typing import Any, Protocol

from lora_dist.adapter_config import BaseConfig, LiveConfig
from lora_dist.classify_config import ClassifyConfig
from lora_dist.cli import adapters, analyse, classify, evaluate, export, generate, import_, merge, switch
from lora_dist.cli.inputs import check_checkpoint
from lora_dist.cli.launch import launch_local
from lora_dist.cli.ranks import adopt_ranks, become_single_process
from lora_dist.config import compute_dp_size


class AdapterVerb(Protocol):
    """A module of cli/: its first line is the summary; `check` refuses early, `run` does the work on every process."""

    __doc__: str | None
    CONFIG: type[Any]

    def check(self, config: Any) -> None: ...

    def run(self, config: Any) -> None: ...


ADAPTER_VERBS: dict[str, AdapterVerb] = {
    "adapters": adapters,
    "import": import_,
    "export": export,
    "merge": merge,
    "switch": switch,
    "analyse": analyse,
    "generate": generate,
    "evaluate": evaluate,
    "classify": classify,
}


def run_adapter_verb(verb: str, overrides: Sequence[str]) -> int:
    """The exit code. A verb without a topology works on one process alone."""
    from lora_dist.cli.compose import compose_as

    module = ADAPTER_VERBS[verb]
    config = compose_as(module.CONFIG, overrides)
    given_world_size = adopt_ranks(os.environ)
    is_first = given_world_size is None or os.environ["RANK"] == "0"
    if is_first:
        module.check(config)
        if isinstance(config, BaseConfig) and config.reads_base:
            check_checkpoint(config.model)
    if not isinstance(config, LiveConfig | ClassifyConfig):
        if is_first:
            module.run(config)
        return 0
    topology = config.topology
    world_size = given_world_size or topology.num_processes
    compute_dp_size(topology, world_size)
    if given_world_size is None and world_size > 1:
        return launch_local(verb, overrides, world_size)
    if given_world_size is None:
        become_single_process(os.environ)
    module.run(config)
    return 0
