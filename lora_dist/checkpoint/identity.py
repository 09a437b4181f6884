"""What a run must share with the one it resumes: compared key by key, with both values in the error."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dist.bottleneck_config import BOTTLENECK_METHODS
from lora_dist.config import LORA_METHODS, RunConfig, compute_num_microbatches
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.prefix_config import LORA_PREFIX_METHODS, PREFIX_METHODS


def describe_run(
    config: RunConfig,
    specs: Sequence[AdapterSpec],
    *,
    base_fingerprint: str,
    data_hashes: Mapping[str, Any],
    dp_size: int,
) -> dict[str, Any]:
    """JSON-able; what decides what a step computes, except what may change: topology, ZeRO, optim, num_steps.

    `data_hashes` says what the examples are; the global batch counts resolved, since the data's position is the step.
    """
    loop = config.loop
    identity: dict[str, Any] = {
        **describe_method(config),
        "base_fingerprint": base_fingerprint,
        "model.base_format": config.model.base_format,
        "data": dict(data_hashes),
        "data.seq_len": config.data.seq_len,
        "data.collate": config.data.collate,
        "loop.seed": loop.seed,
        "loop.global_batch_size": loop.micro_batch_size * dp_size * compute_num_microbatches(loop, dp_size),
    }
    if config.method in LORA_METHODS:
        identity["lora.bias"] = config.lora.bias
        identity["lora.use_rslora"] = config.lora.use_rslora
        identity["lora.init"] = config.lora.init
        identity["lora.use_dora"] = config.lora.use_dora
        identity["lora.modules_to_save"] = sorted(config.lora.modules_to_save)
        identity["lora"] = {
            spec.name: {"lora_rank": spec.lora_rank, "alpha": spec.alpha, "dropout": spec.dropout} for spec in specs
        }
    return identity


def describe_method(config: RunConfig) -> dict[str, Any]:
    """The method and, unless that is LoRA alone, the options that decide what its tensors mean."""
    described: dict[str, Any] = {"method": config.method}
    if config.method in BOTTLENECK_METHODS:
        described["bottleneck"] = {"size": config.bottleneck.size, "activation": config.bottleneck.activation}
    if config.method in PREFIX_METHODS:
        described["prefix"] = {"num_prefix": config.prefix.num_prefix, "num_infix": config.prefix.num_infix}
    if config.method in LORA_PREFIX_METHODS:
        described |= _describe_factors(build_adapter_specs(config.lora, config.model))
    return described


def _describe_factors(specs: Sequence[AdapterSpec]) -> dict[str, Any]:
    """As in a LoRA's own manifest."""
    return {
        "use_rslora": specs[0].rank_stabilized,
        "adapters": {spec.name: {"lora_rank": spec.lora_rank, "alpha": spec.alpha} for spec in specs},
    }


_HASHED = {
    "base_fingerprint": "the weights of model.checkpoint, or what they are drawn from",
    "data.train": "the content of data.train",
    "data.valid": "the content of data.valid",
    "data.tokens": "what tokenizer, template and keys make of data.train",
}
"""What a hash stands for."""


def check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    """ValueError naming the first key in which a stored description differs from this run's, with both values."""
    for key in wanted:
        ours, theirs = wanted[key], found.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            every = dict.fromkeys((*ours, *theirs))
            check_same({k: ours.get(k) for k in every}, theirs, path, f"{prefix}{key}.")
        elif ours != theirs:
            name = f"{prefix}{key}"
            hashed = f" (a hash of {_HASHED[name]})" if name in _HASHED else ""
            raise ValueError(
                f"{path}: {name} is {theirs!r} there and {ours!r} in this run{hashed}; they must be the same"
            )
