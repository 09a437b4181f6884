"""The two factors as the run's seed makes them: the same whole tensors at every topology, then sliced."""

import hashlib
import math

import torch

from lora_dist.lora.spec import AdapterSpec


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_lora_A(spec: AdapterSpec, seed: int) -> torch.Tensor:
    """The whole A [stacked_rank, in_features], fp32, Gaussian as in section 4.1 of the paper.

    Its variance 1 / (3 in_features) is that of the uniform draw of the authors' code, so their learning rates hold.
    B starts at zero and needs no draw.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, spec.name, "lora_A"))
    std = 1.0 / math.sqrt(3 * spec.in_features)
    return torch.randn(spec.stacked_rank, spec.in_features, generator=generator) * std


def slice_shard(whole: torch.Tensor, shard_dim: int | None, tp_size: int, tp_rank: int) -> torch.Tensor:
    """This TP rank's part of a whole tensor, contiguous; the whole where `shard_dim` is None."""
    if shard_dim is None:
        return whole.contiguous()
    size = whole.shape[shard_dim]
    assert size % tp_size == 0, f"tp {tp_size} does not divide {size}"
    return whole.narrow(shard_dim, tp_rank * (size // tp_size), size // tp_size).contiguous()
