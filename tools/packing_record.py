"""What packing gives and how packed examples attend: real tokens a second of three ways to lay out the same data.

    python tools/packing_record.py --record FILE [--rounds N] data=... model=... [overrides of `lora-dist train`]

The ways take a step in turn on one model of one process: packed rows block by block, packed rows under a mask, and rows
of one example padded to the longest, with as many examples a step on the average. Seconds are the CPU time of the
process, on a GPU the time until the device is done.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_dist.bench.record import describe_case
from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.config import RunConfig
from lora_dist.data.loader import Loader, build_loaders
from lora_dist.engine import Engine
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.measure.meter import compute_spread
from lora_dist.run import build_engine, open_job

BLOCKS, MASK, PADDED = "packed, block by block", "packed, under a mask", "padded"


@dataclass(frozen=True, slots=True)
class Way:
    """One of the three."""

    name: str
    loader: Loader
    in_blocks: bool

    def step(self, engine: Engine, step: int, lr: float) -> tuple[float, int]:
        """Seconds and the tokens that are not padding."""
        batches = self.loader.batches_at(step)
        engine.gpt.attends_in_blocks = self.in_blocks
        started = read_clock(engine)
        engine.train_step(batches, step=step, lr=lr)
        return read_clock(engine) - started, batches[0].num_tokens

    def count_saved_bytes(self, engine: Engine, step: int, lr: float) -> int:
        """The most that forward keeps for backward."""
        with open_activation_ledger(engine.gpt.parameters) as ledger:
            self.step(engine, step, lr)
        return ledger.peak_bytes


def read_clock(engine: Engine) -> float:
    device = engine.gpt.topology.device
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(config: RunConfig, num_rounds: int) -> dict[str, Any]:
    with open_job(config) as topology:
        packed = build_loaders(config, dp_size=1, dp_rank=0)
        examples_per_row = round(packed.report.num_train_examples / packed.report.rows_per_epoch)
        num_rows = config.loop.micro_batch_size * examples_per_row
        loop = replace(config.loop, micro_batch_size=num_rows, global_batch_size=None)
        padded = build_loaders(
            replace(config, data=replace(config.data, collate="pad"), loop=loop), dp_size=1, dp_rank=0
        )
        engine, _ = build_engine(config, topology)
        ways = [Way(BLOCKS, packed.train, True), Way(MASK, packed.train, False), Way(PADDED, padded.train, False)]
        saved = {way.name: way.count_saved_bytes(engine, 0, config.optim.lr) for way in ways}
        rounds = [[way.step(engine, 1 + one, config.optim.lr) for way in ways] for one in range(num_rounds)]
        rates = {
            way.name: [tokens / s for s, tokens in taken]
            for way, taken in zip(ways, zip(*rounds, strict=True), strict=True)
        }
        return {
            "clock": "seconds" if topology.device.type == "cuda" else "CPU seconds",
            "case": describe_case(config) | {"examples_per_row": examples_per_row, "num_rounds": num_rounds},
            "data": asdict(packed.report),
            "ways": {name: summarize(rate, rates[BLOCKS], saved[name]) for name, rate in rates.items()},
        }


def summarize(rates: Sequence[float], of_blocks: Sequence[float], saved_bytes: int) -> dict[str, Any]:
    """Rates, and by how much blocks are faster, round by round."""
    ratios = [blocks / rate for blocks, rate in zip(of_blocks, rates, strict=True)]
    return {
        "tokens_per_s": asdict(compute_spread(rates)),
        "blocks_over_this": asdict(compute_spread(ratios)),
        "saved_bytes": saved_bytes,
        "samples": list(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=10)
    args, overrides = parser.parse_known_args()
    become_single_process(os.environ)
    torch.set_num_threads(1)
    config = compose_config([*overrides, "track=none", "topology=single", "data.valid=null", "data.collate=pack"])
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"created": created, "environment": describe_environment(), **measure(config, args.rounds)}
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, way in record["ways"].items():
        print(f"{name}: {way['tokens_per_s']['median']:.0f} tokens / s, {way['saved_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
