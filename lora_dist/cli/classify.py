"""Train an encoder (RoBERTa, DeBERTa) with a classification head on a task with labels, and score it."""

from dataclasses import replace
from pathlib import Path

from lora_dist.classify_config import ClassifyConfig
from lora_dist.cli.inputs import check_new
from lora_dist.config import LoraConfig
from lora_dist.run_dir import CONFIG_FILE, check_run_dir, find_adapter, read_run

CONFIG = ClassifyConfig


def check(config: ClassifyConfig) -> None:
    """ValueError where a file is missing, or where nothing can be written."""
    files = {"train": config.train, "task.references": config.task.references, "predict": config.predict}
    for key, path in files.items():
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of one")
    if config.adapter is not None and not Path(config.adapter).exists():
        raise ValueError(f"adapter={config.adapter} does not exist; give a run, a directory or a file")
    if config.train is None:
        check_new("run_dir", config.run_dir)
    else:
        check_run_dir(Path(config.run_dir), config.resume)


def run(config: ClassifyConfig) -> None:
    """Every process calls it; lora_dist.encoders is imported late because it brings torch and transformers."""
    from lora_dist.encoders.classify import classify

    classify(adopt_trained(config))


def adopt_trained(config: ClassifyConfig) -> ClassifyConfig:
    """`config.adapter` as the adapter's own directory; what only scores a run has the method and factors of it.

    The run may be named by its own directory, or by `adapter/` or `best_adapter/` in it.
    """
    if config.adapter is None:
        return config
    given = Path(config.adapter)
    run_dir = next((place for place in (given, given.parent) if (place / CONFIG_FILE).is_file()), None)
    config = replace(config, adapter=find_adapter(config.adapter))
    if run_dir is None or config.train is not None:
        return config
    trained = read_run(run_dir)
    if "encoder" not in trained:
        raise ValueError(f"adapter={given} is of a decoder's run; give a run of lora-dist classify")
    encoder = replace(config.encoder, method=trained["encoder"]["method"])
    return replace(config, encoder=encoder, lora=LoraConfig(**trained["lora"]))
