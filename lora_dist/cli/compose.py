"""The only module that knows Hydra: conf/ and the command line's overrides composed into a RunConfig."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_dist.cli.explain import explain_composition_error
from lora_dist.cli.schema import ASSETS_DIR, CONF_DIR, list_keys
from lora_dist.config import RunConfig


def compose_config(overrides: Sequence[str], conf_dir: Path = CONF_DIR, *, on_paper: bool = False) -> RunConfig:
    """The run that `key=value` overrides describe. ValueError, one line, names a wrong key, value or file.

    `on_paper`: the run will not take place, so the files that its user would have to give may be missing.
    """
    for override in overrides:
        _check_form(override)
    _register(on_paper)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir)):
            composed = compose("config", overrides=[_open_dictionary(override) for override in overrides])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(explain_composition_error(error, overrides, conf_dir)) from error
    assert isinstance(config, RunConfig)
    return config


def _register(on_paper: bool) -> None:
    """Tell Hydra the dataclasses and the words that conf/ uses: `${asset:NAME}`, `${hf:FIELD}`, `${ask:WHAT}`."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS_DIR / name), replace=True)
    OmegaConf.register_new_resolver("hf", _read_hf_field, replace=True)
    OmegaConf.register_new_resolver("ask", _leave_open if on_paper else _ask, replace=True)


def _read_hf_field(name: str, *, _parent_: DictConfig) -> object:
    """Imported late because it brings torch."""
    from lora_dist.files.hf_checkpoint import read_model_fields

    return read_model_fields(_parent_.checkpoint)[name]


def _ask(what: str) -> str:
    """The user has to give it. OmegaConf's own `???` gives way to a field's default in silence."""
    raise ValueError(f"not set; give {what}")


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


def _open_dictionary(override: str) -> str:
    """`compare.lr.full=1e-4` adds an entry to a dictionary, for which Hydra wants `++` in front."""
    key = override.partition("=")[0]
    dictionaries = [known.path for known in list_keys() if known.is_dictionary]
    return f"++{override}" if any(f"{key}.".startswith(f"{path}.") for path in dictionaries) else override
