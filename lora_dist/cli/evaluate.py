"""Score a file of outputs, anyone's, on a task, beside the paper's figures."""

import os
from pathlib import Path

from lora_dist.task_config import EvaluateConfig

CONFIG = EvaluateConfig


def check(config: EvaluateConfig) -> None:
    """ValueError where a file is missing, or where the scores cannot be written."""
    named = [("predictions", config.predictions), ("task.references", config.task.references)]
    for key, path in named:
        if not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of one")
    output = _find_output(config)
    parent = output.absolute().parent
    if output.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output={output} cannot be written; give the path of a file in a directory that is yours")


def run(config: EvaluateConfig) -> None:
    """Print the table and write the scores; one process calls it."""
    from lora_dist.tasks.items import load_items
    from lora_dist.tasks.paper import ROWS
    from lora_dist.tasks.predictions import load_predictions
    from lora_dist.tasks.scores import format_scores, to_json
    from lora_dist.tasks.scoring import NEEDS_LABELS, score

    task = config.task
    items = load_items(task)
    predictions = load_predictions(config.predictions, items, may_be_empty=task.metric not in NEEDS_LABELS)
    scores = score(task, predictions, items)
    record = to_json(scores, predictions=config.predictions, references=task.references)
    output = _find_output(config)
    output.write_text(record, encoding="utf-8")
    print(format_scores(scores, ROWS.get(task.name, [])))
    print(f"\nscores: {output}", flush=True)


def _find_output(config: EvaluateConfig) -> Path:
    return Path(config.output or f"{config.predictions}.scores.json")
