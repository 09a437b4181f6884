"""Train one experiment at several learning rates a method, and record what each reaches.

    python tools/lr_sweep.py --record tools/records/lr_sweep_demo.json --work-dir runs/lr_sweep \
        --grid lora=2e-3,5e-3,1e-2 --grid full=5e-4,1e-3,2e-3 experiment=e2e_demo topology=single

Every run has one process. A run that has finished in --work-dir is not repeated.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.summary import SUMMARY_FILE, Summary
from lora_dist.run import train


def parse_grid(text: str) -> tuple[str, list[float]]:
    """`lora=1e-3,2e-3` -> ("lora", [1e-3, 2e-3])."""
    method, _, rates = text.partition("=")
    return method, [float(rate) for rate in rates.split(",")]


def run_once(method: str, lr: float, seed: int, overrides: list[str], work_dir: Path) -> Summary:
    run_dir = work_dir / f"{method}-lr{lr:g}-seed{seed}"
    if not (run_dir / SUMMARY_FILE).is_file():
        own = [f"method={method}", f"optim.lr={lr}", f"loop.seed={seed}", f"run_dir={run_dir}", "track=none"]
        train(compose_config([*overrides, *own]))
    return Summary.read(run_dir / SUMMARY_FILE)


def describe(method: str, lr: float, seed: int, summary: Summary) -> dict[str, Any]:
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "valid_loss_before": summary.valid_loss_before,
        "valid_loss_after": summary.valid_loss_after,
        "num_trainable_parameters": summary.num_trainable_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work-dir", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--grid", type=parse_grid, action="append", required=True, metavar="METHOD=LR,LR,...")
    parser.add_argument("--seeds", type=int, default=1)
    args, overrides = parser.parse_known_args()
    become_single_process(os.environ)
    rows = [
        describe(method, lr, seed, run_once(method, lr, seed, overrides, args.work_dir))
        for method, rates in args.grid
        for lr in rates
        for seed in range(args.seeds)
    ]
    best = {
        method: min((row for row in rows if row["method"] == method), key=lambda row: row["valid_loss_after"])
        for method, _ in args.grid
    }
    record = {"overrides": overrides, "environment": describe_environment(), "rows": rows, "best": best}
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['method']:6} lr {row['lr']:<8g} seed {row['seed']}  valid loss {row['valid_loss_after']:.4f}")


if __name__ == "__main__":
    main()
