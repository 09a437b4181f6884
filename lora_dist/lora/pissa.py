"""PiSSA (arXiv:2404.02948): an adapter that starts as the principal part of its weight, whose rest becomes the base.

Training moves B A away from B0 A0 over the base W0 - s B0 A0 (s = alpha / lora_rank). Over the untouched W0 the same
model is s (B A - B0 A0): a plain adapter of twice the rank, which is what is kept.

Shapes: O output features, H input features, R lora_rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lora_dist.lora.spec import AdapterSpec

INITIAL_A, INITIAL_B = "initial_A", "initial_B"


def compute_principal_factors(
    weight_OH: torch.Tensor, lora_rank: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 [R, H] and B0 [O, R] with s B0 A0 the best approximation of that rank, each with half of its singular values.

    Section 3 of the paper, equations 2 and 3. A pair of singular vectors may change its sign together; here the
    largest element of A0's is positive, so that equal weights give equal factors.
    """
    dtype = torch.promote_types(weight_OH.dtype, torch.float32)
    u_OK, singular_K, vt_KH = torch.linalg.svd(weight_OH.to(dtype), full_matrices=False)
    root_R = (singular_K[:lora_rank] / scaling).sqrt()
    a_RH, b_OR = root_R[:, None] * vt_KH[:lora_rank], u_OK[:, :lora_rank] * root_R
    sign_R = a_RH.gather(1, a_RH.abs().argmax(1, keepdim=True)).sign()[:, 0]
    return a_RH * sign_R[:, None], b_OR * sign_R


def subtract_initial(
    specs: Sequence[AdapterSpec], values: Mapping[str, torch.Tensor]
) -> tuple[list[AdapterSpec], dict[str, torch.Tensor]]:
    """What was trained and what it began with, whole and by canonical name, as plain adapters of twice the rank.

    As they are where `values` do not say what they began with, because B began as zero.
    """
    if f"{specs[0].name}.{INITIAL_A}" not in values:
        return list(specs), dict(values)
    kept = {name: value for name, value in values.items() if not name.endswith((INITIAL_A, INITIAL_B))}
    for spec in specs:
        kept[f"{spec.name}.lora_A"] = torch.cat([values[f"{spec.name}.lora_A"], values[f"{spec.name}.{INITIAL_A}"]])
        parts = [values[f"{spec.name}.lora_B"], -values[f"{spec.name}.{INITIAL_B}"]]
        kept[f"{spec.name}.lora_B"] = torch.cat(parts, dim=1)
    return double_ranks(specs), kept


def double_ranks(specs: Sequence[AdapterSpec]) -> list[AdapterSpec]:
    """Of the same scaling."""
    return [
        replace(spec, lora_rank=2 * spec.lora_rank, alpha=spec.alpha * (math.sqrt(2) if spec.rank_stabilized else 2))
        for spec in specs
    ]
