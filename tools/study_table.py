"""The study's table for README.md and its plot, from the record alone: `python tools/study_table.py` draws the plot."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RECORDS = Path(__file__).resolve().parent / "records"
NAMES = {
    "full": "full fine-tuning",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "adapter_h": "AdapterH",
    "adapter_l": "AdapterL",
    "prefix_embed": "PrefixEmbed",
    "prefix_layer": "PrefixLayer",
    "lora_prefix_embed": "LoRA + PrefixEmbed",
    "lora_prefix_layer": "LoRA + PrefixLayer",
}
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")
MB = 1e6


def format_study(record: dict[str, Any]) -> str:
    """One row a variant, those with the fewest parameters first; then what it was measured on."""
    rows = sorted(record["rows"].values(), key=lambda row: row["num_trainable_parameters"])
    head = [
        "method",
        "trained",
        "rate",
        "validation loss",
        *METRICS,
        "tokens / CPU s",
        "memory, MB",
        "file, KB",
        "latency",
    ]
    lines = [_join(head), _join([":--", *["--:"] * (len(head) - 1)])]
    lines += [_join(format_row(row)) for row in rows]
    environment, git = record["environment"], record["environment"]["git"]
    note = (
        f"Mean ± standard deviation over {record['num_seeds']} seeds; {environment['cpu']['model']}, 1 thread; torch"
        f" {environment['versions']['torch']}; {git['commit'][:10]}; `study_demo.json`."
    )
    return "\n".join([*lines, "", note])


def format_row(row: dict[str, Any]) -> list[str]:
    seeds = row["seeds"]
    memory = [sum(seed["ledger_bytes"].values()) / MB for seed in seeds]
    scores = [[seed["scores"][metric] for seed in seeds] for metric in METRICS]
    return [
        f"{NAMES[row['method']]}{', ' + row['adapters'] if row['adapters'] else ''}",
        f"{row['num_trainable_parameters']:,}",
        f"{row['lr']:g}",
        _show([seed["valid_loss"] for seed in seeds], ".3f"),
        *("-" if None in values else _show(values, ".2f") for values in scores),
        f"{statistics.mean(seed['tokens_per_cpu_second'] for seed in seeds):,.0f}",
        f"{statistics.mean(memory):.0f}",
        f"{seeds[0]['checkpoint_bytes'] / 1e3:,.0f}",
        f"{row['latency_over_base']['median']:.2f}x",
    ]


def plot(record: dict[str, Any], path: Path) -> None:
    """Validation loss and BLEU against trained parameters (the paper's figure 2), a line a method."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in record["rows"].values():
        by_method[row["method"]].append(row)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for method, rows in by_method.items():
        rows.sort(key=lambda row: row["num_trainable_parameters"])
        x = [row["num_trainable_parameters"] for row in rows]
        for axis, read in zip(axes, (_read_loss, _read_bleu), strict=True):
            values = [read(row) for row in rows]
            errors = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in values]
            means = [statistics.mean(one) for one in values]
            axis.errorbar(x, means, yerr=errors, marker="o", capsize=2, label=NAMES[method])
    for axis, label in zip(axes, ("validation loss, nats", "BLEU, tokenised"), strict=True):
        axis.set(xscale="log", xlabel="trained parameters", ylabel=label)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _read_loss(row: dict[str, Any]) -> list[float]:
    return [seed["valid_loss"] for seed in row["seeds"]]


def _read_bleu(row: dict[str, Any]) -> list[float]:
    return [seed["scores"]["BLEU"] for seed in row["seeds"]]


def _show(values: Sequence[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    plot(json.loads((RECORDS / "study_demo.json").read_text(encoding="utf-8")), RECORDS / "study_demo.png")
