"""Markdown tables from records of `lora-dist bench`, and from nothing else: `bench_table.py RECORD.json ...`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "lora": "lora_dist LoRA",
    "full": "lora_dist full fine-tuning",
    "lora_compiled": "lora_dist LoRA, compiled",
    "full_compiled": "lora_dist full fine-tuning, compiled",
    "lora_graphs": "lora_dist LoRA, CUDA graphs",
    "full_graphs": "lora_dist full fine-tuning, CUDA graphs",
    "lora_recompute": "lora_dist LoRA, full recompute",
    "full_recompute": "lora_dist full fine-tuning, full recompute",
    "peft": "HF PEFT",
    "peft_tuned": "HF PEFT, tuned",
    "hf_full": "HF full fine-tuning",
}
WORK_PAIRS = (("lora", "full"), ("lora_recompute", "full_recompute"), ("lora", "full_recompute"))
MB = 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    paths = parser.parse_args(argv).records
    print("\n\n".join(format_record(json.loads(path.read_text(encoding="utf-8")), path.name) for path in paths))


def format_record(record: dict[str, Any], file_name: str) -> str:
    """A heading that says what was run where, and one row a contender."""
    parts = [
        [describe_case(record)],
        format_table(record),
        describe_work(record),
        [describe_conditions(record, file_name)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def describe_case(record: dict[str, Any]) -> str:
    case = record["case"]
    targets = ", ".join(case["lora"]["target_modules"])
    loss = (
        "all positions" if case["loss_tokens_per_row"] == case["seq_len"] else f"{case['loss_tokens_per_row']} of them"
    )
    return (
        f"**{case['model']}**, {case['dtype']}, {case['micro_batch_size']} rows of {case['seq_len']} tokens"
        f" ({case['tokens_per_step']} a step, loss on {loss}), LoRA r={case['lora']['rank']} on {targets},"
        f" recompute {case['recompute']}"
    )


def format_table(record: dict[str, Any]) -> list[str]:
    second = "CPU s" if record["clock"] == "cpu_seconds" else "s"
    header = [
        "",
        f"tokens / {second}",
        f"{second} a step (quartiles)",
        "lora_dist LoRA is faster by (quartiles)",
        "saved activations, MB",
        "peak memory, MB",
        "GFLOP a step",
        "of the GEMM ceiling",
    ]
    rows = [format_row(record, name) for name in record["contenders"]]
    return [_join(header), _join(["---", *["---:"] * (len(header) - 1)]), *map(_join, rows)]


def format_row(record: dict[str, Any], name: str) -> list[str]:
    one = record["contenders"][name]
    seconds, ratio = one["seconds_per_step"], record["ratios"].get(f"lora/{name}")
    memory = one["peak_memory"]
    return [
        NAMES[name],
        f"{one['tokens_per_second']:.0f}",
        _format_spread(seconds, ".3g", ""),
        "" if ratio is None else _format_spread(ratio, ".2f", "x"),
        f"{one['saved_activation_bytes'] / MB:.0f}",
        f"{(memory['peak_bytes'] - memory['at_reset_bytes']) / MB:.0f}",
        f"{one['flops_per_step'] / 1e9:.4g}",
        f"{one['share_of_gemm_ceiling']:.0%}",
    ]


def describe_work(record: dict[str, Any]) -> list[str]:
    """LoRA against full fine-tuning beside what their FLOPs alone would give; a list, and empty, without both."""
    contenders, lines = record["contenders"], []
    for name, other in WORK_PAIRS:
        if not {name, other} <= contenders.keys():
            continue
        ratio = record["ratios"][f"{name}/{other}"]
        work = contenders[other]["flops_per_step"] / contenders[name]["flops_per_step"]
        lines.append(
            f"- {NAMES[name]} : {NAMES[other]} {_format_spread(ratio, '.2f', 'x')}; by their FLOPs alone {work:.2f}x"
            f" ({ratio['median'] / work:.2f} of it)"
        )
    return lines


def describe_conditions(record: dict[str, Any], file_name: str) -> str:
    """Hardware, versions, spread of the ceilings and how busy the machine was."""
    environment, gemm = record["environment"], record["ceilings"]["gemm_flops_per_second"]
    gpus = environment["gpus"]
    device = gpus["devices"][0]["name"] if gpus and record["clock"] == "seconds" else environment["cpu"]["model"]
    threads = "" if gpus and record["clock"] == "seconds" else f", {record['case']['bench']['num_threads']} thread"
    versions = environment["versions"]
    git = environment["git"]
    commit = "no commit" if git is None else git["commit"][:10] + (" (changed)" if git["dirty"] else "")
    load = record["load_average"]
    return (
        f"{record['case']['bench']['num_rounds']} rounds, one step of each in turn; {device}{threads};"
        f" GEMM ceiling {_format_spread({k: v / 1e9 for k, v in gemm.items()}, '.0f', '')} GFLOP/s;"
        f" load average {_format_spread(load, '.1f', '')} on {environment['cpu']['num_usable_cores']} cores;"
        f" torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']};"
        f" {commit}; `{file_name}`."
    )


def _format_spread(spread: dict[str, float], form: str, unit: str) -> str:
    return f"{spread['median']:{form}}{unit} ({spread['p25']:{form}}-{spread['p75']:{form}})"


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
