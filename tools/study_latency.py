"""How much longer one forward pass takes with what each run of the study trained, than on the base alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from latency_record import Case, Variant, attach_lora, build_shape, measure_rounds, open_single_process, share_weights

from lora_dist.adapter_config import LiveConfig
from lora_dist.adapter_jobs import find_slots, load, open_on_base, put_adapters
from lora_dist.bench.record import compute_ratios
from lora_dist.checkpoint.store import StoredAdapter
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


def open_run(base: ShardedGpt, model: ModelConfig, run: Path) -> "ShardedGpt | LongerInput":
    """A model of its own with what the run trained: adapters on a copy of the base, or the whole model."""
    gpt = share_weights(base, model, copy=True)
    if (run / "model").is_dir():
        fill_base(gpt, replace(model, checkpoint=str(run / "model")), seed=0)
        return gpt
    live = LiveConfig(model=model, topology=TopologyConfig(), device="cpu")
    stored = open_on_base(gpt, live, find_adapter(str(run)))
    if isinstance(stored, StoredAdapter):
        attach_lora(gpt, load(gpt, stored))
    else:
        put_adapters(gpt, [stored], merge=stored.needs_merge)
    slots = find_slots([stored])
    return gpt.eval() if slots is None else LongerInput(gpt.eval(), slots.num_slots)


class LongerInput:
    """A model that reads its trained vectors before every input: what a prefix costs is its positions."""

    def __init__(self, gpt: ShardedGpt, num_slots: int) -> None:
        self._gpt, self._num_slots = gpt, num_slots
        self.topology, self.true_vocab_size = gpt.topology, gpt.true_vocab_size

    def __call__(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, mask: None) -> torch.Tensor:
        slots_BN = torch.arange(1, self._num_slots + 1).expand(len(tokens_BS), -1)
        self._gpt.slots_BS = torch.cat([slots_BN, torch.zeros_like(tokens_BS)], dim=1)
        tokens_BS = torch.cat([torch.zeros_like(slots_BN), tokens_BS], dim=1)
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        logits: torch.Tensor = self._gpt(tokens_BS, positions_BS, mask)
        return logits
