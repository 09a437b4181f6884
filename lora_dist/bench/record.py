"""The record of one bench: every sample, their spread, ratios round by round, and the formulae behind the rates."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lora_dist.bench.batches import count_targets_per_row
from lora_dist.bench.ceilings import CeilingSample
from lora_dist.bench.worker import Account, Sample
from lora_dist.config import RunConfig, compute_num_microbatches
from lora_dist.measure.meter import compute_spread

SCHEMA = 1
NOMINAL_PEAK_FLOPS = {
    ("NVIDIA H100 80GB HBM3", "bf16"): 989e12,
    ("NVIDIA H200", "bf16"): 989e12,
    ("NVIDIA H100 80GB HBM3", "fp16"): 989e12,
    ("NVIDIA H200", "fp16"): 989e12,
    ("Tesla V100-SXM2-32GB", "fp16"): 125e12,
}
"""Dense matrix peak by device name and dtype, from the makers' data sheets."""

FORMULAE = {
    "tokens_per_second": "positions of a step / median seconds; on CPU seconds are the process's CPU time",
    "flops_per_step": "torch FlopCounterMode over one step: 2 a multiply-add, matrix products and attention only,"
    " attention in full (not halved for causality), recomputation included",
    "achieved_flops": "flops_per_step / median seconds",
    "share_of_gemm_ceiling": "achieved_flops / median GEMM rate of the same call",
    "mfu": "achieved_flops / nominal dense peak of the device and dtype; null where no nominal peak is known",
    "ratio A/B": "per round, seconds of B / seconds of A: how many times as fast A is; spread over rounds",
}


class HasMeasurements(Protocol):
    """`lora_dist.bench.runner.Measurements`, as far as the record looks at it."""

    samples: dict[str, list[Sample]]
    accounts: dict[str, Account]
    ceilings: list[CeilingSample]
    load_averages: list[float]


def build_record(config: RunConfig, environment: dict[str, Any], measured: HasMeasurements) -> dict[str, Any]:
    """JSON-able. The numbers that tables show are computed here, from samples the record holds too."""
    clock = "seconds" if environment["gpus"] and config.device != "cpu" else "cpu_seconds"
    gemm_rate = statistics.median(sample.gemm_flops_per_second for sample in measured.ceilings)
    peak = _find_nominal_peak(environment, config)
    num_tokens = count_tokens(config)
    contenders = {
        name: _describe_contender(samples, measured.accounts[name], clock, num_tokens, gemm_rate, peak)
        for name, samples in measured.samples.items()
    }
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "clock": clock,
        "case": describe_case(config),
        "environment": environment,
        "load_average": asdict(compute_spread(measured.load_averages)),
        "ceilings": {
            key: asdict(compute_spread([getattr(sample, key) for sample in measured.ceilings]))
            for key in ("gemm_flops_per_second", "copy_bytes_per_second")
        },
        "contenders": contenders,
        "ratios": compute_ratios(measured.samples, clock),
        "formulae": FORMULAE,
    }


def describe_case(config: RunConfig) -> dict[str, Any]:
    """What was run; the numbers that the results depend on."""
    model, loop = config.model, config.loop
    return {
        "model": model.name,
        "family": model.family,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "lora": asdict(config.lora),
        "optim": asdict(config.optim),
        "zero_stage": config.zero.stage,
        "dtype": config.dtype,
        "recompute": loop.recomputation,
        "micro_batch_size": loop.micro_batch_size,
        "num_microbatches": compute_num_microbatches(loop, dp_size=1),
        "seq_len": config.data.seq_len,
        "tokens_per_step": count_tokens(config),
        "loss_tokens_per_row": count_targets_per_row(config),
        "bench": asdict(config.bench),
        "seed": loop.seed,
    }


def count_tokens(config: RunConfig) -> int:
    """Positions of one step."""
    return compute_num_microbatches(config.loop, dp_size=1) * config.loop.micro_batch_size * config.data.seq_len


def compute_ratios(samples: dict[str, list[Sample]], clock: str) -> dict[str, dict[str, float]]:
    """`A/B`: how many times as fast A is as B, round by round: a slow spell of the machine slows both."""
    ratios = {}
    for name, own in samples.items():
        for other, theirs in samples.items():
            if name != other:
                rounds = [getattr(b, clock) / getattr(a, clock) for a, b in zip(own, theirs, strict=True)]
                ratios[f"{name}/{other}"] = asdict(compute_spread(rounds))
    return ratios


def _describe_contender(
    samples: Sequence[Sample], account: Account, clock: str, num_tokens: int, gemm_rate: float, peak: float | None
) -> dict[str, Any]:
    seconds = compute_spread([getattr(sample, clock) for sample in samples])
    achieved = account.flops / seconds.median
    return {
        "seconds_per_step": asdict(seconds),
        "wall_seconds_per_step": asdict(compute_spread([sample.seconds for sample in samples])),
        "tokens_per_second": num_tokens / seconds.median,
        "num_trainable": account.num_trainable,
        "num_parameters": account.num_parameters,
        "saved_activation_bytes": account.saved_activation_bytes,
        "peak_memory": asdict(account.peak_memory),
        "flops_per_step": account.flops,
        "achieved_flops": achieved,
        "share_of_gemm_ceiling": achieved / gemm_rate,
        "mfu": None if peak is None else achieved / peak,
        "samples": [asdict(sample) for sample in samples],
    }


def _find_nominal_peak(environment: dict[str, Any], config: RunConfig) -> float | None:
    gpus = environment["gpus"]
    if not gpus or config.device == "cpu":
        return None
    return NOMINAL_PEAK_FLOPS.get((gpus["devices"][0]["name"], config.dtype))
