"""The only module that knows Hydra: conf/ and the command line's overrides composed into a RunConfig."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_dist.cli.explain import NOT_SET, explain_composition_error
from lora_dist.cli.overrides import write_override
from lora_dist.cli.schema import ASSETS_DIR, CONF_DIR, list_groups
from lora_dist.config import ModelConfig, RunConfig
from lora_dist.stopping import load_torch

_Config = TypeVar("_Config")
_DEFAULT_OPTIONS = {
    **{"model": "demo", "topology": "single", "zero": "stage1", "track": "wandb"},
    **{"generate": "greedy", "encoder": "hf", "task": "???"},
}
"""Of the verbs that have no file in conf/; ??? has to be given. A task may choose how to generate, so it comes last."""


def compose_config(overrides: Sequence[str], conf_dir: Path = CONF_DIR, *, on_paper: bool = False) -> RunConfig:
    """The run that `key=value` overrides describe. ValueError, one line, names a wrong key, value or file.

    `on_paper`: the run will not take place, so the files that its user would have to give may be missing.
    """
    return compose_as(RunConfig, overrides, conf_dir, on_paper=on_paper)


def compose_as(
    owner: type[_Config], overrides: Sequence[str], conf_dir: Path = CONF_DIR, *, on_paper: bool = False
) -> _Config:
    """The same for any verb's dataclass; RunConfig's defaults are in conf/config.yaml, the others' in the dataclass."""
    for override in overrides:
        _check_form(override)
    primary = _register(owner, on_paper)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir)):
            composed = compose(primary, overrides=[write_override(override, owner) for override in overrides])
        _shrink(composed)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(explain_composition_error(error, overrides, conf_dir, owner)) from error
    assert isinstance(config, owner)
    return config


def _shrink(composed: DictConfig) -> None:
    """What `shrink` asks for: the kind of topology kept, its sizes at most two, and few experts where there are some;
    of the layers that are named those that are left. No file of conf/ can say it.
    """
    if not composed.get("shrink"):
        return
    for node, keys, most in (
        (composed.topology, ("tp_size", "pp_size", "cp_size", "dp_size"), 2),
        (composed.model, ("num_experts",), 4),
        (composed.model, ("experts_per_token", "num_expert_groups"), 2),
        (composed.model, ("groups_per_token", "num_dense_layers"), 1),
        (composed.model, ("shared_ffn_size", "dense_ffn_size"), 256),
        (composed.model, ("query_latent_size", "kv_latent_size"), 64),
        (composed.model, ("value_head_size", "indexer_head_size"), 16),
        (composed.model, ("indexer_heads",), 4),
        (composed.model, ("rope_head_size",), 8),
        (composed.model, ("delta_key_heads",), 2),
        (composed.model, ("delta_value_heads",), 4),
        (composed.model, ("delta_key_size", "delta_value_size"), 16),
    ):
        for key in keys:
            node[key] = node[key] and min(node[key], most)
    for key in ("full_attention_layers", "layers_without_indexer", "unturned_layers"):
        composed.model[key] = [layer for layer in composed.model[key] if layer < composed.model.num_layers]


def _register(owner: type, on_paper: bool) -> str:
    """Tell Hydra the dataclass and the words that conf/ uses: `${asset:NAME}`, `${hf:FIELD}`, `${ask:WHAT}`.

    Returns the name of the configuration to compose.
    """
    store = ConfigStore.instance()
    schema = "run_schema" if owner is RunConfig else f"{owner.__name__}_schema"
    store.store(name=schema, node=owner)
    OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS_DIR / name), replace=True)
    OmegaConf.register_new_resolver("hf", _read_hf_field, replace=True)
    OmegaConf.register_new_resolver("ask", _leave_open if on_paper else _ask, replace=True)
    if owner is RunConfig:
        return "config"
    groups = [{name: option} for name, option in _DEFAULT_OPTIONS.items() if name in list_groups(owner=owner)]
    store.store(name=owner.__name__, node={"defaults": [schema, "_self_", *groups], **_ask_for_required(owner)})
    return owner.__name__


def _ask_for_required(owner: type) -> dict[str, str]:
    """The fields without a default: left out, they are asked for by name."""
    required = [field.name for field in fields(owner) if field.default is MISSING and field.default_factory is MISSING]
    return {name: f"${{ask:'{name}=...'}}" for name in required if name not in _DEFAULT_OPTIONS}


def _read_hf_field(name: str, *, _parent_: DictConfig) -> object:
    """What config.json does not say is as ModelConfig has it. Imported late because it brings torch."""
    load_torch()
    from lora_dist.files.hf_checkpoint import read_model_fields

    return getattr(ModelConfig(**read_model_fields(_parent_.checkpoint)), name)


def _ask(what: str) -> str:
    """The user has to give it. OmegaConf's own `???` gives way to a field's default in silence."""
    raise ValueError(f"{NOT_SET}; give {what}")


def _leave_open(what: str) -> str:
    return f"({what})"


def _check_form(override: str) -> None:
    """Refuse what would walk past the dataclasses: added keys, removed keys, Hydra's own settings."""
    if override[:1] in "+~":
        raise ValueError(f"{override}: no key can be added or removed; write key=value")
    if not re.match(r"[A-Za-z_][\w./-]*=", override):
        raise ValueError(f"{override!r} is not of the form key=value")
    if re.match(r"hydra[./]", override):
        raise ValueError(f"{override}: Hydra's own settings are fixed")
