"""How much of a step are the sum of the TP-partial gradients and the optimizer.

    torchrun --nproc-per-node 2 tools/step_share.py --record FILE experiment=... topology=tp2

Times both within the steps of the slowest process; waiting for the others counts. Overrides are `lora-dist train`'s.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lora_dist.engine
from lora_dist.bench.record import describe_case
from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import adopt_ranks
from lora_dist.data.loader import build_loaders
from lora_dist.engine import Engine
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.meter import compute_spread
from lora_dist.run import build_engine, open_job
from lora_dist.topology import Topology

PARTIAL_SUM, OPTIMIZER = "sum of TP-partial gradients", "optimizer step"


@dataclass(slots=True)
class Clock:
    """Seconds by part since the last reading; on a GPU the device is waited for at both ends."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = self.now()
            result = call(*args, **options)
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - started
            return result

        return timed

    def read(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


@contextmanager
def timed_engine(engine: Engine, clock: Clock):
    """The engine's own step, with a clock around its two last parts."""
    original = lora_dist.engine.sum_tp_partial_gradients
    lora_dist.engine.sum_tp_partial_gradients = clock.wrap(PARTIAL_SUM, original)
    engine.zero.step = clock.wrap(OPTIMIZER, engine.zero.step)
    engine.train_step = clock.wrap("step", engine.train_step)
    try:
        yield engine
    finally:
        lora_dist.engine.sum_tp_partial_gradients = original


def measure(overrides: Sequence[str], num_steps: int) -> tuple[dict[str, Any], Topology]:
    config = compose_config([*overrides, "track=none"])
    with open_job(config) as topology:
        loaders = build_loaders(config, dp_size=topology.dp_size, dp_rank=topology.dp_rank)
        engine, _ = build_engine(config, topology)
        clock, steps = Clock(topology.device), []
        with timed_engine(engine, clock) as timed:
            for step in range(num_steps + 1):  # the first is not counted
                dist.barrier()  # what one process waits for another counts as neither's
                timed.train_step(loaders.train.batches_at(step), step=step, lr=config.optim.lr)
                steps.append(clock.read())
        everyone: list[Any] = [None] * topology.world_size
        dist.all_gather_object(everyone, steps[1:])
        slowest = [max(one, key=lambda seconds: seconds["step"]) for one in zip(*everyone, strict=True)]
        case = describe_case(config) | {"topology": asdict(config.topology)}
        return summarize(slowest) | {"case": case, "num_steps": num_steps}, topology


def summarize(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    shares = [(one[PARTIAL_SUM] + one[OPTIMIZER]) / one["step"] for one in steps]
    return {
        "seconds": {part: asdict(compute_spread([one[part] for one in steps])) for part in steps[0]},
        "share": asdict(compute_spread(shares)),
        "samples": list(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("--num-steps", type=int, default=5)
    args, overrides = parser.parse_known_args()
    adopt_ranks(os.environ)
    torch.set_num_threads(1)
    result, topology = measure(overrides, args.num_steps)
    if topology.global_rank > 0:
        return
    median = statistics.median(one["step"] for one in result["samples"])
    print(f"step {median:.3f} s; partial sums and optimizer {result['share']['median']:.2%} of it")
    if args.record is not None:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"created": created, "environment": describe_environment(), "clock": "seconds", **result}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
