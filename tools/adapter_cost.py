"""What several adapters in one batch cost, and what a switch of tasks costs, on a GPT-2 shape: a table on stdout.

    python tools/adapter_cost.py [--layers 4] [--rows 32] [--seq-len 64] [--repeats 7]

Times are process CPU time a forward pass on CPU, wall time on a GPU; medians, interleaved.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import torch

from lora_dist.cli.ranks import become_single_process
from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, attach_adapters, load_shards
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import open_topology
from lora_dist.topology import choose_device

COUNTS = (1, 2, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("rows", 32), ("seq-len", 64), ("lora-rank", 4), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    become_single_process(os.environ)
    device = choose_device("auto", 0)
    with open_topology(TopologyConfig(), device=device, local_rank=0, seed=0) as topology:
        model = describe_shape(options.layers)
        gpt = build_model(model, topology, dtype=torch.float32, recompute="none", clock=DropoutClock())
        initialize_base(gpt, model, seed=0)
        gpt.requires_grad_(False).eval()
        adapters = [draw_adapter(gpt, model, index, options.lora_rank) for index in range(max(COUNTS))]
        measure_batches(gpt, adapters, options)
        measure_switch(gpt, adapters, options)


def describe_shape(num_layers: int) -> ModelConfig:
    """GPT-2 medium's layers; a small vocabulary, so that the output layer does not hide them."""
    return ModelConfig(
        name="shape",
        num_layers=num_layers,
        hidden_size=1024,
        num_heads=16,
        ffn_hidden_size=4096,
        vocab_size=1024,
        max_position_embeddings=1024,
    )


def draw_adapter(gpt: ShardedGpt, model: ModelConfig, index: int, lora_rank: int) -> LoadedAdapter:
    specs = build_adapter_specs(LoraConfig(rank=lora_rank), model)
    values = {}
    for spec in specs:
        values[f"{spec.name}.lora_A"] = torch.randn(spec.lora_rank, spec.in_features)
        values[f"{spec.name}.lora_B"] = 0.01 * torch.randn(spec.out_features, spec.lora_rank)
    return load_shards(gpt, f"task{index}", specs, values)


def measure_batches(gpt: ShardedGpt, adapters: list[LoadedAdapter], options: argparse.Namespace) -> None:
    """A forward pass of the base, and of batches whose rows share 1, 2, 8 or 32 adapters."""
    times: dict[int, list[float]] = {count: [] for count in (0, *COUNTS)}
    for repeat in range(options.repeats + 1):
        for count, found in times.items():
            attach_adapters(gpt, adapters[:count])
            gpt.clock.adapter_of_row = tuple(row % count if count else None for row in range(options.rows))
            elapsed = measure_once(gpt, lambda: forward(gpt, options))
            found += [elapsed] if repeat else []  # the first is a warm-up
    attach_adapters(gpt, [])
    base = median(times[0])
    print(
        f"{options.layers} layers of GPT-2 medium, {options.rows} x {options.seq_len} tokens, rank {options.lora_rank}"
    )
    print("adapters in the batch   ms a forward pass   over the base")
    for count, found in times.items():
        print(f"{count:21d}   {median(found):17.1f}   {median(found) / base - 1:12.1%}")


def measure_switch(gpt: ShardedGpt, adapters: list[LoadedAdapter], options: argparse.Namespace) -> None:
    live, times = LiveMerge(gpt), []
    live.merge(adapters[0])
    for repeat in range(2 * options.repeats):
        times.append(measure_once(gpt, lambda n=repeat: live.merge(adapters[1 - n % 2])))
    gpt.clock.adapter_of_row = ()
    one = argparse.Namespace(rows=1, seq_len=128)
    forward_ms = median(measure_once(gpt, lambda: forward(gpt, one)) for _ in range(options.repeats))
    kept = live.kept_bytes / sum(parameter.nbytes for parameter in gpt.decoder.parameters())
    print(f"switch {median(times):.1f} ms, a forward pass of 1 x 128 tokens {forward_ms:.1f} ms")
    print(f"base rows kept: {live.kept_bytes / 2**20:.0f} MiB, {kept:.1%} of the layers' weights")


@torch.no_grad()
def forward(gpt: ShardedGpt, options: argparse.Namespace) -> None:
    tokens_BS = torch.zeros(options.rows, options.seq_len, dtype=torch.long, device=gpt.topology.device)
    gpt(tokens_BS, torch.arange(options.seq_len, device=tokens_BS.device).expand_as(tokens_BS), None)


def measure_once(gpt: ShardedGpt, action: Callable[[], object]) -> float:
    """Milliseconds."""
    on_gpu = gpt.topology.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


if __name__ == "__main__":
    main()
