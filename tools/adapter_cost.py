"""What several adapters in one batch cost, and a switch of tasks in the weights: `python tools/adapter_cost.py`.

GPT-2 medium on one process, weights drawn from a seed, LoRA on q and v; a round is one pass of each batch in turn, so
that a slow spell of the machine slows all. On a CPU the clock is the process's CPU time, on a GPU wall time. Writes
tools/records/adapter_cost/NAME.json; needs a clean checkout.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from latency_record import build_shape, draw_adapter, open_single_process
from tqdm import tqdm

from lora_dist.base_shapes import count_parameters
from lora_dist.batch import Batch
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, attach_adapters, describe_attached
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.meter import compute_spread
from lora_dist.topology import choose_device

RECORDS = Path(__file__).resolve().parent / "records" / "adapter_cost"
COUNTS = (1, 2, 8, 32)
"""Adapters in the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed."""

    rows: int
    seq_len: int
    lora_rank: int
    num_rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_medium", help="a file of conf/model")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    for name, default in (("rows", 32), ("seq-len", 32), ("lora-rank", 4), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    case = Case(rows=options.rows, seq_len=options.seq_len, lora_rank=options.lora_rank, num_rounds=options.rounds)
    device = choose_device(options.device, 0)
    model = compose_config([f"model={options.model}", "data=fake", f"data.seq_len={case.seq_len}"]).model
    record = make_record(model, case, device=device, num_threads=options.threads)
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{device.type}_{options.model}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote records/adapter_cost/{path.name}")
    return 0


def make_record(model: ModelConfig, case: Case, *, device: torch.device, num_threads: int) -> dict[str, Any]:
    """JSON-able: every sample, in seconds, and the spreads and round-by-round ratios that the table shows."""
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    environment = describe_environment()
    with open_single_process(device) as topology:
        gpt = build_shape(model, topology, torch.float32)
        initialize_base(gpt, model, seed=0)
        specs = build_adapter_specs(LoraConfig(rank=case.lora_rank), model)
        adapters = [draw_adapter(gpt, specs) for _ in range(max(COUNTS))]
        measured = {
            "forward": measure_batches(gpt, adapters, case, run_forward, (0, *COUNTS)),
            "forward and backward": measure_batches(gpt, adapters, case, run_both, COUNTS),
        }
        attach_adapters(gpt, [])
        switch = measure_switch(gpt, adapters, case)
    return {
        "schema": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "clock": "cpu_seconds" if device.type == "cpu" else "seconds",
        "num_threads": num_threads if device.type == "cpu" else None,
        "model": {**asdict(model), "num_parameters": count_parameters(model)},
        "environment": environment,
        "case": asdict(case),
        "batches": measured,
        "switch": switch,
    }


def measure_batches(
    gpt: ShardedGpt,
    adapters: Sequence[LoadedAdapter],
    case: Case,
    run: Callable[[ShardedGpt, Batch], None],
    counts: Sequence[int],
) -> dict[str, Any]:
    """By the number of adapters whose rows take turns in the batch, 0 for the base alone: seconds, and over those of
    one adapter.
    """
    samples: dict[int, list[float]] = {count: [] for count in counts}
    for round_ in tqdm(range(case.num_rounds + 1), desc=run.__name__, unit="round"):
        for count, found in samples.items():
            attach_adapters(gpt, adapters[:count])
            train_attached(adapters[:count])
            batch = build_batch(gpt, case, tuple(row % count if count else None for row in range(case.rows)))
            seconds = time_once(gpt, lambda batch=batch: run(gpt, batch))
            found += [seconds] if round_ else []  # the first is a warm-up
    return {
        str(count): {
            "seconds": asdict(compute_spread(found)),
            "over_one": asdict(compute_spread([a / b for a, b in zip(found, samples[1], strict=True)])),
            "samples": found,
        }
        for count, found in samples.items()
    }


def train_attached(adapters: Sequence[LoadedAdapter]) -> None:
    """Let their factors train, without gradients yet."""
    for adapter in adapters:
        for one in describe_attached(adapter):
            one.parameter.grad = None


def build_batch(gpt: ShardedGpt, case: Case, adapter_of_row: tuple[int | None, ...]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, gpt.true_vocab_size, (case.rows, case.seq_len + 1), generator=generator)
    return Batch(
        input_ids_BS=tokens[:, :-1],
        labels_BS=tokens[:, 1:],
        loss_mask_BS=torch.ones(case.rows, case.seq_len, dtype=torch.bool),
        position_ids_BS=torch.arange(case.seq_len).expand(case.rows, -1),
        row_blocks=None,
        row_ids_B=torch.arange(case.rows),
        num_loss_tokens=case.rows * case.seq_len,
        num_tokens=case.rows * case.seq_len,
        adapter_of_row=adapter_of_row,
    )


@torch.no_grad()
def run_forward(gpt: ShardedGpt, batch: Batch) -> None:
    """All logits, as in generation's first pass."""
    gpt.eval()
    gpt.clock.adapter_of_row = batch.adapter_of_row
    batch = batch.to(gpt.topology.device)
    gpt(batch.input_ids_BS, batch.position_ids_BS, None)


def run_both(gpt: ShardedGpt, batch: Batch) -> None:
    """The loss and every adapter's gradients."""
    forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)


def measure_switch(gpt: ShardedGpt, adapters: Sequence[LoadedAdapter], case: Case) -> dict[str, Any]:
    """Seconds of a switch in the weights, and of a forward pass of one row of 128 positions, in turn."""
    live = LiveMerge(gpt)
    live.merge(adapters[0])
    num_positions = min(128, gpt.max_position_embeddings)
    short = build_batch(gpt, replace(case, rows=1, seq_len=num_positions), ())
    switches, passes = [], []
    for round_ in range(case.num_rounds + 1):
        switch = time_once(gpt, lambda n=round_: live.merge(adapters[1 - n % 2]))
        forward = time_once(gpt, lambda: run_forward(gpt, short))
        switches += [switch] if round_ else []
        passes += [forward] if round_ else []
    kept = live.kept_bytes
    live.unmerge()
    return {
        "switch_seconds": asdict(compute_spread(switches)),
        "forward_seconds": asdict(compute_spread(passes)),
        "forward_positions": num_positions,
        "kept_bytes": kept,
        "layer_weight_bytes": sum(parameter.nbytes for parameter in gpt.decoder.parameters()),
        "samples": {"switch": switches, "forward": passes},
    }


def time_once(gpt: ShardedGpt, action: Callable[[], object]) -> float:
    """Seconds."""
    on_gpu = gpt.topology.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    raise SystemExit(main())
