"""Score what a trained adapter answers to a task, or a file of outputs, anyone's, beside the paper's figures."""

import os
from pathlib import Path

from lora_dist.cli.inputs import check_adapter
from lora_dist.evaluate_config import EvaluateConfig
from lora_dist.run_dir import find_adapter, find_run

CONFIG = EvaluateConfig


def check(config: EvaluateConfig) -> None:
    """ValueError where a file or the adapter is missing, or where outputs and scores cannot be written."""
    for key, path in (("predictions", config.predictions), ("task.references", config.task.references)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of one")
    if config.adapter is not None:
        _check_trained(config.adapter)
    if config.reads_base and config.model.tokenizer is None and config.model.checkpoint is None:
        raise ValueError(
            f"model={config.model.name} has no tokenizer; give model.tokenizer=DIR or model.checkpoint=DIR"
        )
    if config.reads_base:
        _check_writable("texts", _find_texts(config))
    _check_writable("output", Path(config.output or f"{config.predictions or _find_texts(config)}.scores.json"))


def _check_trained(directory: str) -> None:
    adapter, model = find_adapter(directory), Path(directory) / "model"
    if adapter == directory and model.is_dir():
        raise ValueError(
            f"adapter={directory} is a run that trained the whole model; give model.checkpoint={model} base_alone=true"
            f" texts={directory}/texts.jsonl instead"
        )
    check_adapter("adapter", adapter)


def run(config: EvaluateConfig) -> None:
    """Write the scores and print their table. Every process calls it where a model is asked."""
    if config.reads_base:
        from lora_dist.evaluate_job import evaluate_model

        evaluate_model(config, _find_texts(config))
        return
    from lora_dist.tasks.items import load_items
    from lora_dist.tasks.predictions import load_predictions
    from lora_dist.tasks.scoring import NEEDS_LABELS, score, write_scores

    assert config.predictions is not None
    items = load_items(config.task)
    predictions = load_predictions(config.predictions, items, may_be_empty=config.task.metric not in NEEDS_LABELS)
    write_scores(config.task, score(config.task, predictions, items), config.predictions, config.output)


def _find_texts(config: EvaluateConfig) -> Path:
    if config.texts is not None:
        return Path(config.texts)
    assert config.adapter is not None, "EvaluateConfig has checked it"
    adapter = find_adapter(config.adapter)
    run_dir = find_run(adapter)
    name = f"evaluate-{config.task.name}.jsonl"
    return Path(f"{adapter.rstrip('/')}.{name}") if run_dir is None else run_dir / name


def _check_writable(key: str, path: Path) -> None:
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={path} cannot be written; give the path of a file in a directory that is yours")
