"""What each method adds to one forward pass (the paper's table 1): `python tools/latency_record.py`.

Base, LoRA merged and beside the weights, AdapterH, AdapterL on one process, weights drawn from a seed, all logits, no
gradients; a round is one forward pass of each in turn, so that a slow spell of the machine slows all. On a CPU the
clock is the process's CPU time, on a GPU wall time. Writes tools/records/latency/NAME.json; needs a clean checkout.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_dist.base_shapes import count_parameters
from lora_dist.bench.record import compute_ratios
from lora_dist.bottleneck.spec import build_bottleneck_specs
from lora_dist.bottleneck_config import BottleneckConfig
from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, load_shards
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import open_topology
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.meter import compute_spread
from lora_dist.topology import DTYPES, Topology, choose_device

RECORDS = Path(__file__).resolve().parent / "records" / "latency"
SIZES = {
    "0.5M": {"lora": 5, "adapter_h": 5, "adapter_l": 9},
    "11M": {"lora": 112, "adapter_h": 112, "adapter_l": 224},
}
"""Ranks and sizes whose parameters, on GPT-2 medium, are the paper's table 1."""
ACTIVATIONS = {"adapter_h": "gelu", "adapter_l": "relu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of the table."""

    rows: int
    seq_len: int
    budget: str
    """Key of SIZES."""
    num_rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed forward pass."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One model that is timed."""

    gpt: ShardedGpt
    size: int | None
    """lora_rank, or the bottleneck's size; None for the base."""
    num_parameters: int
    """Of the method, whether its parameters lie beside the weights or in them."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_medium", help="a file of conf/model")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--rounds", default="5,10,50", help="timed rounds of 32 x 512, 16 x 256 and 1 x 128; 0 leaves one out"
    )
    parser.add_argument("--only", help="these beside the base, e.g. lora_merged; all unless given")
    parser.add_argument("--name", help="of the record; DEVICE_MODEL unless given")
    options = parser.parse_args(argv)
    rounds = [int(number) for number in options.rounds.split(",")]
    shapes = ((32, 512, "0.5M"), (16, 256, "11M"), (1, 128, "11M"))
    cases = [
        Case(rows=rows, seq_len=seq_len, budget=budget, num_rounds=number)
        for (rows, seq_len, budget), number in zip(shapes, rounds, strict=True)
        if number > 0
    ]
    device = choose_device(options.device, 0)
    record = make_record(
        compose_config([f"model={options.model}", "data=fake", "data.seq_len=128"]).model,
        cases,
        device=device,
        dtype=options.dtype,
        num_threads=options.threads,
        only=options.only.split(",") if options.only else (),
    )
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{options.name or f'{device.type}_{options.model}'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote records/latency/{path.name}")
    return 0


def make_record(
    model: ModelConfig,
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: str,
    num_threads: int,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """JSON-able: every sample, and the spreads and round-by-round ratios that the table shows."""
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    clock = "cpu_seconds" if device.type == "cpu" else "seconds"
    environment = describe_environment()
    with open_single_process(device) as topology:
        base = build_shape(model, topology, DTYPES[dtype])
        initialize_base(base, model, seed=0)
        measured = [measure_case(base, model, case, clock, only) for case in cases]
    return {
        "schema": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "clock": clock,
        "device": device.type,
        "dtype": dtype,
        "num_threads": num_threads if device.type == "cpu" else None,
        "model": {**asdict(model), "num_parameters": count_parameters(model)},
        "environment": environment,
        "cases": measured,
    }


@contextmanager
def open_single_process(device: torch.device) -> Iterator[Topology]:
    become_single_process(os.environ)
    with open_topology(TopologyConfig(), device=device, local_rank=0, seed=0) as topology:
        yield topology


def build_shape(model: ModelConfig, topology: Topology, dtype: torch.dtype) -> ShardedGpt:
    gpt = build_model(model, topology, dtype=dtype, clock=DropoutClock())
    return gpt.requires_grad_(False).eval()


def measure_case(base: ShardedGpt, model: ModelConfig, case: Case, clock: str, only: Sequence[str]) -> dict[str, Any]:
    variants = build_variants(base, model, SIZES[case.budget])
    if only:
        variants = {name: variants[name] for name in ("base", *only)}
    samples, loads = measure_rounds(variants, case)
    return {
        **asdict(case),
        "load_average": asdict(compute_spread(loads)),
        "variants": {
            name: {
                "size": variant.size,
                "num_parameters": variant.num_parameters,
                "seconds": asdict(compute_spread([getattr(sample, clock) for sample in samples[name]])),
                "samples": [asdict(sample) for sample in samples[name]],
            }
            for name, variant in variants.items()
        },
        "ratios": compute_ratios(samples, clock),
    }


def build_variants(base: ShardedGpt, model: ModelConfig, sizes: Mapping[str, int]) -> dict[str, Variant]:
    """The models of one case. All but the merged one share the base's weights."""
    specs = build_adapter_specs(LoraConfig(rank=sizes["lora"]), model)
    num_lora = sum(spec.num_parameters for spec in specs)
    variants = {"base": Variant(gpt=base, size=None, num_parameters=0)}
    for name, put in (("lora_merged", merge_lora), ("lora", attach_lora)):
        gpt = share_weights(base, model, copy=name == "lora_merged")
        put(gpt, draw_adapter(gpt, specs))
        variants[name] = Variant(gpt=gpt, size=sizes["lora"], num_parameters=num_lora)
    for method, activation in ACTIVATIONS.items():
        gpt = share_weights(base, model, copy=False)
        config = BottleneckConfig(size=sizes[method], activation=activation)
        bottlenecks = build_bottleneck_specs(method, config, model)
        apply_bottlenecks(gpt, bottlenecks, init_std=config.init_std, seed=0)
        gpt.to(gpt.config.params_dtype).requires_grad_(False)
        count = sum(spec.num_parameters for spec in bottlenecks)
        variants[method] = Variant(gpt=gpt, size=sizes[method], num_parameters=count)
    return variants


def share_weights(base: ShardedGpt, model: ModelConfig, *, copy: bool) -> ShardedGpt:
    """Another model on the base's very tensors, or on copies of them."""
    gpt = build_shape(model, base.topology, base.config.params_dtype)
    for own, theirs in zip(gpt.parameters(), base.parameters(), strict=True):
        own.data = theirs.data.clone() if copy else theirs.data
    return gpt


def draw_adapter(gpt: ShardedGpt, specs: Sequence[AdapterSpec]) -> LoadedAdapter:
    """B not zero, and everything in the base's dtype."""
    generator, values = torch.Generator().manual_seed(0), {}
    for spec in specs:
        values[f"{spec.name}.lora_A"] = torch.randn(spec.lora_rank, spec.in_features, generator=generator)
        values[f"{spec.name}.lora_B"] = 1e-3 * torch.randn(spec.out_features, spec.lora_rank, generator=generator)
    adapter = load_shards(gpt, "drawn", specs, values)
    for shard in adapter.shards.values():
        shard.to(gpt.config.params_dtype)
    return adapter


def merge_lora(gpt: ShardedGpt, adapter: LoadedAdapter) -> None:
    LiveMerge(gpt, keep_base=False).merge(adapter)


def attach_lora(gpt: ShardedGpt, adapter: LoadedAdapter) -> None:
    """As in training: one adapter beside the weights."""
    for name, shard in adapter.shards.items():
        gpt.get_submodule(name).lora = shard.eval()


def measure_rounds(variants: Mapping[str, Variant], case: Case) -> tuple[dict[str, list[Sample]], list[float]]:
    """Samples of the timed rounds, after one that is not, and the machine's load average at each."""
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    names, loads = list(variants), []
    for round_ in tqdm(range(case.num_rounds + 1), desc=f"{case.rows} x {case.seq_len}", unit="round"):
        first = round_ % len(names)  # each takes each place in turn
        for name in [*names[first:], *names[:first]]:
            sample = measure_forward(variants[name].gpt, case)
            samples[name] += [sample] if round_ else []
        loads += [os.getloadavg()[0]] if round_ else []
    return samples, loads


def measure_forward(gpt: ShardedGpt, case: Case) -> Sample:
    device = gpt.topology.device
    generator = torch.Generator().manual_seed(1)
    shape = (case.rows, case.seq_len)
    tokens_BS = torch.randint(0, gpt.true_vocab_size, shape, generator=generator).to(device)
    positions_BS = torch.arange(case.seq_len, device=device).expand(shape)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _do_nothing
    with torch.no_grad():
        wait()
        start, cpu_start = time.perf_counter(), time.process_time()
        gpt(tokens_BS, positions_BS, None)
        wait()
        return Sample(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start)


def _do_nothing() -> None:
    """A CPU has done its work when the call returns."""


if __name__ == "__main__":
    sys.exit(main())
