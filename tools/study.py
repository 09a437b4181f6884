"""The paper's table 3 and figure 2 in small: every method on the packaged model and sample, `python tools/study.py`.

Each variant trains with seed 0 at neighbouring learning rates of LADDER until the best of them has a worse one on
either side, then with the other seeds at the best; the runs at the best are evaluated on the sample's test contexts
with the paper's decoding. One process, one thread, about two hours of a core; a run that is in --work-dir already is
not repeated, so `--only NAME,...` on several cores and one last call without it make one record.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lr_sweep import run_once
from study_latency import measure_latency
from study_table import plot

from lora_dist.cli import evaluate
from lora_dist.cli.compose import compose_as, compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.evaluate_config import EvaluateConfig
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.summary import Summary

RECORD = Path(__file__).resolve().parent / "records" / "study_demo.json"
COMMON = ["experiment=e2e_demo", "topology=single", "device=cpu", "loop.micro_batch_size=8"]
LADDER = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantSpec:
    """One row of the table."""

    method: str
    overrides: tuple[str, ...] = ()
    lr: float
    """Where the search begins; of LADDER."""


def lora(lora_rank: int, targets: str = "[all]") -> tuple[str, ...]:
    """With the demo's scaling of 2."""
    return f"lora.rank={lora_rank}", f"lora.alpha={2 * lora_rank}", f"lora.target_modules={targets}"


def slots(num_prefix: int, num_infix: int) -> tuple[str, ...]:
    return f"prefix.num_prefix={num_prefix}", f"prefix.num_infix={num_infix}"


VARIANTS = {
    "full": VariantSpec(method="full", lr=2e-3),
    "bitfit": VariantSpec(method="bitfit", lr=1e-2),
    "lora_8k": VariantSpec(method="lora", overrides=lora(2, targets="[q_proj,v_proj]"), lr=1e-2),
    "lora_37k": VariantSpec(method="lora", overrides=lora(2), lr=1e-2),
    "lora_295k": VariantSpec(method="lora", overrides=lora(16), lr=1e-2),
    "adapter_h_35k": VariantSpec(method="adapter_h", overrides=("bottleneck.size=8",), lr=1e-2),
    "adapter_l_9k": VariantSpec(method="adapter_l", overrides=("bottleneck.size=3",), lr=1e-2),
    "adapter_l_36k": VariantSpec(method="adapter_l", overrides=("bottleneck.size=16",), lr=1e-2),
    "adapter_l_294k": VariantSpec(method="adapter_l", overrides=("bottleneck.size=142",), lr=5e-3),
    "prefix_embed_10k": VariantSpec(method="prefix_embed", overrides=slots(32, 8), lr=5e-2),
    "prefix_layer_8k": VariantSpec(method="prefix_layer", overrides=slots(4, 4), lr=5e-2),
    "prefix_layer_37k": VariantSpec(method="prefix_layer", overrides=slots(32, 4), lr=5e-2),
    "lora_prefix_embed_40k": VariantSpec(method="lora_prefix_embed", overrides=(*lora(2), *slots(8, 4)), lr=1e-2),
    "lora_prefix_layer_35k": VariantSpec(method="lora_prefix_layer", overrides=(*lora(1), *slots(8, 8)), lr=1e-2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One finished run."""

    lr: float
    seed: int
    directory: Path
    summary: Summary

    @property
    def valid_loss(self) -> float:
        assert self.summary.valid_loss_after is not None
        return self.summary.valid_loss_after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/study"), help="directory of the runs")
    parser.add_argument("--only", help="variants to train, comma-separated; the record is left as it is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", type=Path, default=RECORD)
    options, overrides = parser.parse_known_args(argv)
    names = list(VARIANTS) if options.only is None else options.only.split(",")
    torch.set_num_threads(1)
    become_single_process(os.environ)
    common = [*COMMON, *overrides]
    rows = {name: study(name, VARIANTS[name], common, options.work_dir, options.seeds) for name in names}
    if options.only is None:
        runs = {name: name_run(options.work_dir / name, VARIANTS[name], row["lr"], 0) for name, row in rows.items()}
        for name, ratio in measure_latency(compose_config(common).model, runs).items():
            rows[name]["latency_over_base"] = ratio
        record = {"overrides": common, "num_seeds": options.seeds, "environment": describe_environment(), "rows": rows}
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(record, options.record.with_suffix(".png"))
        print(f"wrote {options.record.name}")
    return 0


def study(name: str, variant: VariantSpec, common: Sequence[str], work_dir: Path, num_seeds: int) -> dict[str, Any]:
    """JSON-able: the search, and what the seeds at its best learning rate give."""
    tried = search_lr(name, variant, common, work_dir)
    best = min(tried, key=lambda run: run.valid_loss)
    seeds = [best, *(train_once(name, variant, best.lr, seed, common, work_dir) for seed in range(1, num_seeds))]
    scores = [evaluate_once(variant, run) for run in seeds]
    return {
        "method": variant.method,
        "overrides": list(variant.overrides),
        "lr": best.lr,
        "search": [{"lr": run.lr, "valid_loss": run.valid_loss} for run in tried],
        "num_trainable_parameters": best.summary.num_trainable_parameters,
        "adapters": best.summary.setup.adapters,
        "seeds": [describe_run(run, one) for run, one in zip(seeds, scores, strict=True)],
    }


def search_lr(name: str, variant: VariantSpec, common: Sequence[str], work_dir: Path) -> list[Trained]:
    """The runs of seed 0 by learning rate, the best of them not at either end (unless LADDER ends there)."""
    middle = LADDER.index(variant.lr)
    runs = {
        place: train_once(name, variant, LADDER[place], 0, common, work_dir) for place in range(middle - 1, middle + 2)
    }
    while True:
        best = min(runs, key=lambda place: runs[place].valid_loss)
        missing = [place for place in (best - 1, best + 1) if 0 <= place < len(LADDER) and place not in runs]
        if not missing:
            return [runs[place] for place in sorted(runs)]
        runs[missing[0]] = train_once(name, variant, LADDER[missing[0]], 0, common, work_dir)


def train_once(name: str, variant: VariantSpec, lr: float, seed: int, common: Sequence[str], work_dir: Path) -> Trained:
    directory = work_dir / name
    summary = run_once(variant.method, lr, seed, [*common, *variant.overrides], directory)
    print(f"{name:16} lr {lr:<8g} seed {seed}  valid loss {summary.valid_loss_after:.4f}", flush=True)
    return Trained(lr=lr, seed=seed, directory=name_run(directory, variant, lr, seed), summary=summary)


def name_run(directory: Path, variant: VariantSpec, lr: float, seed: int) -> Path:
    """As `lr_sweep.run_once` names it."""
    return directory / f"{variant.method}-lr{lr:g}-seed{seed}"


def evaluate_once(variant: VariantSpec, run: Trained) -> dict[str, float | None]:
    """The scores of the tokenised text, as `lora-dist evaluate task=e2e_demo` gives them."""
    scores = run.directory / "scores.json"
    if not scores.is_file():
        who = [f"adapter={run.directory}"]
        if variant.method == "full":
            who = ["base_alone=true", f"model.checkpoint={run.directory}/model", f"texts={run.directory}/texts.jsonl"]
        common = ["task=e2e_demo", "model=demo", "topology=single", "device=cpu"]
        evaluate.run(compose_as(EvaluateConfig, [*common, *who, f"output={scores}"]))
    values: dict[str, float | None] = json.loads(scores.read_text(encoding="utf-8"))["rows"][0]["values"]
    return values


def describe_run(run: Trained, scores: dict[str, float | None]) -> dict[str, Any]:
    summary = run.summary
    assert summary.throughput is not None
    assert summary.cpu_seconds_per_step is not None
    return {
        "seed": run.seed,
        "valid_loss": run.valid_loss,
        "scores": scores,
        "tokens_per_cpu_second": summary.throughput.tokens_per_step / summary.cpu_seconds_per_step,
        "ledger_bytes": summary.ledger_bytes,
        "flops_per_step": summary.flops_per_step,
        "checkpoint_bytes": summary.checkpoint_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
