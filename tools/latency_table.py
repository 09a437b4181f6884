"""The latency table of README.md, from a record of tools/latency_record.py and from nothing else."""

from typing import Any

NAMES = {
    "base": "base",
    "lora_merged": "LoRA, merged",
    "lora": "LoRA, beside the weights",
    "adapter_l": "AdapterL",
    "adapter_h": "AdapterH",
}
PAPER_MS = {
    (32, 512): {"base": 1449.4, "lora_merged": 1449.4, "adapter_l": 1482.0, "adapter_h": 1492.2},
    (16, 256): {"base": 338.0, "lora_merged": 338.0, "adapter_l": 354.8, "adapter_h": 366.3},
    (1, 128): {"base": 19.8, "lora_merged": 19.8, "adapter_l": 23.9, "adapter_h": 25.8},
}
"""Table 1: medians on an RTX 8000, by rows and positions."""


def format_latency(record: dict[str, Any], file_name: str) -> str:
    """A heading, one row a variant of each case, and where it was measured."""
    unit = "CPU ms" if record["clock"] == "cpu_seconds" else "ms"
    header = ["rows x positions", "", "added parameters", f"{unit} (quartiles)", "over the base", "paper, RTX 8000"]
    lines = [_join(header), _join([":--", ":--", "--:", "--:", "--:", "--:"])]
    lines += [_join(_format_row(case, name)) for case in record["cases"] for name in case["variants"]]
    heading = f"**{record['model']['name']}**, {record['dtype']}, one forward pass, all logits, no gradients"
    return "\n".join([heading, "", *lines, "", describe_conditions(record, file_name)])


def _format_row(case: dict[str, Any], name: str) -> list[str]:
    one, ratio = case["variants"][name], case["ratios"].get(f"base/{name}")
    paper = PAPER_MS.get((case["rows"], case["seq_len"]), {})
    seconds = {key: 1e3 * value for key, value in one["seconds"].items()}
    over = "" if ratio is None else f"{ratio['median'] - 1:+.1%} ({ratio['p25'] - 1:+.1%} to {ratio['p75'] - 1:+.1%})"
    theirs = str(paper.get(name, ""))
    if name in paper and paper[name] != paper["base"]:
        theirs += f" ({paper[name] / paper['base'] - 1:+.1%})"
    return [
        f"{case['rows']} x {case['seq_len']}",
        NAMES[name],
        f"{one['num_parameters']:,}",
        "{} ({}-{})".format(*(_format_ms(seconds[key]) for key in ("median", "p25", "p75"))),
        over,
        theirs,
    ]


def _format_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def describe_conditions(record: dict[str, Any], file_name: str) -> str:
    """Hardware, versions, commit, and how busy the machine was."""
    environment = record["environment"]
    git, on_gpu = environment["git"], record["device"] == "cuda"
    device = environment["gpus"]["devices"][0]["name"] if on_gpu else environment["cpu"]["model"]
    threads = "" if on_gpu else f", {record['num_threads']} thread"
    commit = "no commit" if git is None else git["commit"][:10] + (" (changed)" if git["dirty"] else "")
    rounds = ", ".join(str(case["num_rounds"]) for case in record["cases"])
    loads = ", ".join(f"{case['load_average']['median']:.1f}" for case in record["cases"])
    return (
        f"{rounds} rounds, one forward pass of each in turn, ratios round by round; {device}{threads}; load average"
        f" {loads} on {environment['cpu']['num_usable_cores']} cores; torch {environment['versions']['torch']};"
        f" {commit}; `{file_name}`."
    )


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
