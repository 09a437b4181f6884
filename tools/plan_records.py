"""Makes the records of `lora-dist plan` anew: `python tools/plan_records.py [NAME ...]`, all of them without a NAME.

A record holds the command, what it answered, and what answering cost. Needs a clean checkout and about ten minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from lora_dist.measure.environment import describe_environment

RECORDS = Path(__file__).resolve().parent / "records" / "plan"
SEARCH = ("data=fake", "data.seq_len=2048", "loop.global_batch_size=16", "plan.search=true")
OPEN = (
    *("dtype=bf16", "data=fake", "data.seq_len=2048", "loop.micro_batch_size=1", "loop.global_batch_size=8"),
    *("lora.target_modules=[all]", "lora.rank=16", "plan.recompute=[none]"),
)
QUANTIZED = (*OPEN, "compare.methods=[lora]")
LONG = (
    *("dtype=bf16", "data=fake", "data.seq_len=131072", "loop.micro_batch_size=1", "compare.methods=[lora]"),
    *("lora.target_modules=[all]", "lora.rank=16", "plan.recompute=[full]"),
)
CASES: dict[str, tuple[str, ...]] = {
    "gpt3_175b_v100": ("experiment=gpt3_175b_v100",),
    "gpt3_175b_v100_full": ("experiment=gpt3_175b_v100_full",),
    "gpt3_175b_v100_full_mb8": ("experiment=gpt3_175b_v100_full", "loop.micro_batch_size=8", "plan.recompute=[full]"),
    "gpt3_175b_h200": ("experiment=gpt3_175b_h200",),
    **{
        f"gpt3_175b_h200_{base_format}": (
            *("experiment=gpt3_175b_h200_nf4", f"model.base_format={base_format}", "plan.recompute=[none]"),
        )
        for base_format in ("native", "fp8", "nf4", "nf4_double")
    },
    "search_v100_12": ("experiment=gpt3_175b_v100", *SEARCH, "plan.num_gpus=12"),
    "search_v100_16": ("experiment=gpt3_175b_v100", *SEARCH, "plan.num_gpus=16"),
    "open_llama3_1_70b": (
        *("model=llama3_1_70b", "model.base_format=nf4", "topology=tp2_sp", "hardware=h100", *QUANTIZED),
    ),
    "open_llama3_1_405b": (
        *("model=llama3_1_405b", "model.base_format=fp8", "topology=tp8_sp", "hardware=h100", *QUANTIZED),
    ),
    "open_glm4_5_air": ("model=glm4_5_air", "topology=tp8_sp", "hardware=h100", *OPEN),
    "open_qwen3_235b": ("model=qwen3_235b_a22b", "topology=tp4_sp", "topology.pp_size=2", "hardware=h200", *OPEN),
    "open_glm4_5": ("model=glm4_5", "topology=tp8_sp", "hardware=h200", *OPEN),
    "open_gpt_oss_120b": (
        *("model=gpt_oss_120b", "model.base_format=mxfp4", "topology=single", "hardware=h100", *QUANTIZED),
    ),
    "open_qwen3_next": (
        *("model=qwen3_next_80b_a3b", "model.base_format=nf4", "topology=single", "hardware=h100", *QUANTIZED),
    ),
    "open_deepseek_v3": (
        *("model=deepseek_v3", "model.base_format=nf4", "topology=tp8_sp", "hardware=h100", *QUANTIZED),
    ),
    "open_minimax_m2": ("model=minimax_m2", "topology=tp8_sp", "hardware=h100", *OPEN),
    "open_glm5": ("model=glm5", "model.base_format=nf4", "topology=tp8_sp", "hardware=h100", *QUANTIZED),
    "long_glm5": (
        *("model=glm5", "model.base_format=nf4", "topology=tp8_sp", "hardware=h100", "dtype=bf16", "data=fake"),
        *("data.seq_len=32768", "loop.micro_batch_size=1", "loop.global_batch_size=8", "lora.target_modules=[all]"),
        *("lora.rank=16", "plan.recompute=[full]", "compare.methods=[lora]"),
    ),
    "open_kimi_k2": ("model=kimi_k2", "model.base_format=nf4", "topology=tp8_sp", "hardware=h200", *QUANTIZED),
    **{
        f"long_llama3_1_70b_{topology}": (
            *("model=llama3_1_70b", "model.base_format=nf4", *words, "hardware=h100", *LONG),
        )
        for topology, words in {
            "tp8": ("topology=tp8_sp",),
            "tp4_cp2": ("topology=tp4_sp", "topology.cp_size=2"),
            "tp2_cp4": ("topology=tp2_sp", "topology.cp_size=4"),
        }.items()
    },
    "long_llama3_1_70b_32": ("model=llama3_1_70b", "topology=tp8_cp4_sp", "hardware=h100", *LONG),
    "long_qwen3_8b": ("model=qwen3_8b", "model.max_position_embeddings=131072", "topology=cp8", "hardware=h100", *LONG),
    "search_h200_4": ("experiment=gpt3_175b_h200", *SEARCH, "plan.num_gpus=4"),
}
KEPT_OF_A_JOB = ("needed_bytes", "memory_bytes", "step_seconds", "tokens_per_sec_per_gpu", "num_trainable", "flops")


def main(names: Sequence[str]) -> int:
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        print(f"no such record: {', '.join(unknown)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in names or CASES:
        print(f"[plan] {name}", flush=True)
        text = json.dumps(make_record(CASES[name]), indent=1)
        (RECORDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return 0


def make_record(overrides: Sequence[str]) -> dict[str, Any]:
    command = ["lora-dist", "plan", *overrides]
    with tempfile.TemporaryDirectory() as run_dir:
        cost = run_measured([str(Path(sys.executable).with_name(command[0])), *command[1:], f"run_dir={run_dir}"])
        answer = {path.stem: json.loads(path.read_text("utf-8")) for path in Path(run_dir).glob("*.json")}
    if "search" in answer:
        answer["search"]["candidates"] = [shorten_candidate(one) for one in answer["search"]["candidates"]]
    return {
        "command": " ".join(command),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": describe_environment(),
        "cost": cost,
        **answer,
    }


def run_measured(command: Sequence[str]) -> dict[str, float]:
    """Run it and its processes to their end. Memory is proportional set size, summed over them, ten times a second."""
    start, before = time.perf_counter(), psutil.Process().cpu_times()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum_memory(child.pid))
        time.sleep(0.1)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with code {child.returncode}")
    after = psutil.Process().cpu_times()
    cpu_seconds = sum(getattr(after, key) - getattr(before, key) for key in ("children_user", "children_system"))
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak}


def sum_memory(pid: int) -> int:
    """Bytes of `pid` and all below it; one that ends meanwhile counts nothing."""
    total = 0
    try:
        for process in [(root := psutil.Process(pid)), *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return total
    return total


def shorten_candidate(one: Mapping[str, Any]) -> dict[str, Any]:
    """Without the ledger of each of its processes."""
    job = one["job"]
    return {**one, "job": None if job is None else {key: job[key] for key in KEPT_OF_A_JOB}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
