"""How much longer one forward pass takes with what each run of the study trained, than on the base alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from latency_record import Case, Variant, build_shape, measure_rounds, open_single_process, share_weights

from lora_dist.adapter_config import LiveConfig
from lora_dist.adapter_jobs import open_on_base, put_adapters
from lora_dist.bench.record import compute_ratios
from lora_dist.config import ModelConfig, TopologyConfig
from lora_dist.mcore.hf_weights import fill_base
from lora_dist.mcore.model import ShardedGpt
from lora_dist.run_dir import find_adapter

CASE = Case(rows=1, seq_len=128, budget="", num_rounds=100)


def measure_latency(model: ModelConfig, runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """By the runs' names: spread of the ratios over CASE's rounds, CPU time, adapters beside the weights."""
    with open_single_process(torch.device("cpu")) as topology:
        base = build_shape(model, topology, torch.float32)
        fill_base(base, model, seed=0)
        variants = {"base": Variant(gpt=base, size=None, num_parameters=0)}
        for name, run in runs.items():
            variants[name] = Variant(gpt=open_run(base, model, run), size=None, num_parameters=0)
        samples, _ = measure_rounds(variants, CASE)
    ratios = compute_ratios(samples, "cpu_seconds")
    return {name: ratios[f"base/{name}"] for name in runs}


def open_run(base: ShardedGpt, model: ModelConfig, run: Path) -> ShardedGpt:
    """A model of its own with what the run trained: adapters on a copy of the base, or the whole model."""
    gpt = share_weights(base, model, copy=True)
    if (run / "model").is_dir():
        fill_base(gpt, replace(model, checkpoint=str(run / "model")), seed=0)
        return gpt
    live = LiveConfig(model=model, topology=TopologyConfig(), device="cpu")
    stored = open_on_base(gpt, live, find_adapter(str(run)))
    put_adapters(gpt, [stored], merge=stored.needs_merge)
    return gpt.eval()
