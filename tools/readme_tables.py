"""Writes the tables of README.md from the records beside this file: `python tools/readme_tables.py [--check]`."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapter_cost_table import format_adapter_cost
from bench_table import format_record
from latency_table import format_latency
from plan_table import format_base_formats, format_models, format_paper, format_plan, format_search
from study_table import format_study

from lora_dist.tasks.paper import ROWS
from lora_dist.tasks.scores import ScoreRow, Scores, format_scores

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tools" / "records"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    readme = ROOT / "README.md"
    current = readme.read_text(encoding="utf-8")
    wanted = fill(current)
    if parser.parse_args().check:
        return int(current != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


def fill(page: str) -> str:
    """`page` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    builders = {
        "e2e_demo": build_demo_table,
        "performance": build_performance_tables,
        "gpu": build_gpu_tables,
        "quality": build_quality_table,
        "study": lambda: format_study(_read("study_demo")),
        "e2e_tgen": build_scores_table,
        "plan": build_plan_tables,
        "search": build_search_tables,
        "kernels": build_kernel_table,
        "base_format": build_base_format_table,
        "open_models": build_open_models_table,
        "long_rows": build_long_rows_table,
        "latency": build_latency_tables,
        "packing": build_packing_table,
        "window": build_window_table,
        "adapter_cost": lambda: format_adapter_cost(_read("adapter_cost/cpu_gpt2_medium"), "cpu_gpt2_medium.json"),
    }

    def replace(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{builders[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


def build_demo_table() -> str:
    """The report of the quickstart."""
    report = _read("e2e_demo")
    rows = [report["table"]["columns"], *report["table"]["rows"]]
    lines = [_join(rows[0]), _join([":--", *["--:"] * (len(rows[0]) - 2), ":--"]), *map(_join, rows[1:])]
    return "\n".join(lines)


def build_performance_tables() -> str:
    names = sorted(path.stem for path in (RECORDS / "bench").glob("cpu_*.json"))
    return "\n\n".join(format_record(_read(f"bench/{name}"), f"{name}.json") for name in names)


def build_gpu_tables() -> str:
    """The records of tools/gpu_suite.sh, and which of its benches have none yet."""
    listed = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_suite.sh", "--list"], capture_output=True, text=True, check=True
    )
    names = [line.partition("\t")[0] for line in listed.stdout.splitlines()]
    there = [name for name in names if (RECORDS / "bench" / f"{name}.json").is_file()]
    tables = [format_record(_read(f"bench/{name}"), f"{name}.json") for name in there]
    missing = [f"`{name}`" for name in names if name not in there]
    return "\n\n".join([*tables, *([f"Not yet measured: {', '.join(missing)}."] if missing else [])])


def build_quality_table() -> str:
    lines = []
    for row in _read("lr_sweep_demo")["rows"]:
        trainable, loss = f"{row['num_trainable_parameters']:,}", f"{row['valid_loss_after']:.3f}"
        lines.append(_join([row["method"], trainable, f"{row['lr']:g}", loss]))
    return "\n".join([_join(["method", "trainable", "learning rate", "validation loss"]), "|:--|--:|--:|--:|", *lines])


def build_scores_table() -> str:
    """What `lora-dist evaluate` prints of the outputs that the record is of."""
    record = _read("e2e_tgen")
    rows = [ScoreRow(**row) for row in record["rows"]]
    scores = Scores(task=record["task"], num_items=record["num_items"], rows=rows, notes=record["notes"])
    return format_scores(scores, ROWS[scores.task])


def build_plan_tables() -> str:
    """LoRA's job of the paper, the job that holds both methods, and the paper's figures beside that."""
    name = "plan/gpt3_175b_v100_full"
    both = _read(name)
    return "\n\n".join(
        [format_plan(_read("plan/gpt3_175b_v100")), format_plan(both), format_paper(both, _read(f"{name}_mb8"))]
    )


def build_search_tables() -> str:
    return "\n\n".join(format_search(_read(f"plan/search_{name}")) for name in ("v100_12", "v100_16", "h200_4"))


def build_open_models_table() -> str:
    names = (
        "llama3_1_70b",
        "llama3_1_405b",
        "glm4_5_air",
        "minimax_m2",
        "qwen3_235b",
        "glm4_5",
        "gpt_oss_120b",
        "qwen3_next",
        "deepseek_v3",
        "glm5",
        "kimi_k2",
    )
    return format_models([_read(f"plan/open_{name}") for name in names])


def build_long_rows_table() -> str:
    names = ("llama3_1_70b_tp8", "llama3_1_70b_tp4_cp2", "llama3_1_70b_tp2_cp4", "llama3_1_70b_32", "qwen3_8b")
    return format_models([_read(f"plan/long_{name}") for name in names])


def build_base_format_table() -> str:
    formats = ("native", "fp8", "nf4", "nf4_double")
    return format_base_formats({name: _read(f"plan/gpt3_175b_h200_{name}") for name in formats})


def build_packing_table() -> str:
    """Of every record of packing_record.py."""
    titles = ["model and data", "way", "real tokens / s", "blocks : this (quartiles)", "saved activations, MB"]
    lines = [_join(titles), "|:--|:--|--:|--:|--:|"]
    for path in sorted((RECORDS / "packing").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        case, file = record["case"], record["data"]["files"]["train"]["name"]
        rows = f"{case['examples_per_row']} examples in {case['seq_len']:,} positions"
        what = f"{case['model']} ({record['clock']}), {file}: {rows}"
        for name, way in record["ways"].items():
            ratio, rate = way["blocks_over_this"], way["tokens_per_s"]["median"]
            faster = "" if ratio["p25"] == ratio["p75"] == 1 else _format_ratio(ratio)
            lines.append(_join([what, name, f"{rate:,.0f}", faster, f"{way['saved_bytes'] / 1e6:,.0f}"]))
            what = ""
    return "\n".join(lines)


def build_window_table() -> str:
    """Of every record of window_record.py."""
    titles = ["a layer's heads", "window", "mask, s", "tiles, s", "mask : tiles (quartiles)"]
    titles += ["kept, MB: mask, tiles", "the mask itself, MB", "of tiles"]
    lines = [_join(titles), "|:--|--:|--:|--:|--:|--:|--:|--:|"]
    for path in sorted((RECORDS / "window").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        what = f"{record['dtype']}, {record['clock']}, {record['seq_len']:,} positions"
        lines += [_join(_describe_window(row, what)) for row in record["rows"]]
    return "\n".join(lines)


def _describe_window(row: dict[str, Any], what: str) -> list[str]:
    heads = f"{row['num_heads']} query heads of {row['head_size']}, {row['num_kv_heads']} of keys"
    rank = f" on tp {row['tp_size']}" if row["tp_size"] > 1 else ""
    seconds = [f"{row['seconds'][way]['median']:.2f}" for way in ("mask", "tiles")]
    kept, masks = ([row[key][way] / 1e6 for way in ("mask", "tiles")] for key in ("kept_bytes", "mask_bytes"))
    return [
        *(f"{row['model']}{rank} ({what}): {heads}", f"{row['window']:,}", *seconds, _format_ratio(row["mask/tiles"])),
        *(f"{kept[0]:.1f}, {kept[1]:.1f}", f"{masks[0]:.1f}", f"{masks[1]:.1f}"),
    ]


def _format_ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})"


def build_kernel_table() -> str:
    """What adapters add to single linears, and what the step is but forward and backward."""
    kernels, share = _read("kernels_cpu"), _read("step_share_gpt2_medium")
    lines = [_join(["linear, one rank's shard", "frozen alone, s", "with LoRA : frozen (quartiles)"]), "|:--|--:|--:|"]
    for row in kernels["rows"]:
        ratio, (out_features, in_features) = row["lora/frozen"], row["shard_shape"]
        shard = f"{row['model']} {row['linear']}, tp {row['tp_size']}: {out_features} x {in_features}"
        spread = f"{ratio['median']:.3f}x ({ratio['p25']:.3f}-{ratio['p75']:.3f})"
        lines.append(_join([shard, f"{row['seconds']['frozen']['median']:.2f}", spread]))
    case, part = share["case"], share["share"]
    rows = case["micro_batch_size"] * case["num_microbatches"]
    note = (
        f"{kernels['num_tokens']:,} tokens, {kernels['dtype']}, rank {kernels['lora_rank']}, CPU time of one thread,"
        f" {kernels['num_rounds']} rounds. Sum of the TP-partial gradients and optimizer: {part['median']:.2%}"
        f" ({part['p25']:.2%}-{part['p75']:.2%}) of a step of {case['model']} on"
        f" tp {case['topology']['tp_size']}, {rows} x {case['seq_len']} tokens ({share['num_steps']} steps, wall time)."
    )
    return "\n".join([*lines, "", note])


def build_latency_tables() -> str:
    names = sorted(path.stem for path in (RECORDS / "latency").glob("*.json"))
    tables = [format_latency(_read(f"latency/{name}"), f"{name}.json") for name in names]
    return "\n\n".join(tables) or "No record yet."


def _read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
