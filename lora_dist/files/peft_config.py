"""adapter_config.json of HF PEFT's LoRA; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_dist.lora.spec import AdapterSpec


def describe_peft_config(
    modules: Mapping[str, tuple[int, float]],
    first: AdapterSpec,
    *,
    bias: str,
    base_name: str | None,
    fan_in_fan_out: bool,
    modules_to_save: Sequence[str] = (),
    parameters: Mapping[str, tuple[int, float]] | None = None,
) -> dict[str, Any]:
    """`modules` are the adapted linears' ranks and alphas by full name, `parameters` those of what PEFT adapts as
    parameters, without dropout.

    The commonest of the ranks and alphas are the defaults, the others are patterns on full names.
    """
    adapted = {**modules, **(parameters or {})}
    (lora_rank, alpha), _ = Counter(adapted.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "fan_in_fan_out": fan_in_fan_out,
        "r": lora_rank,
        "lora_alpha": _shorten(alpha),
        "lora_dropout": 0.0 if parameters else first.dropout,
        "use_rslora": first.rank_stabilized,
        "bias": bias,
        **({"use_dora": True} if first.use_dora else {}),
        "target_modules": list(modules),
        **({"target_parameters": list(parameters)} if parameters else {}),
        "rank_pattern": {name: r for name, (r, _) in adapted.items() if r != lora_rank},
        "alpha_pattern": {name: _shorten(a) for name, (_, a) in adapted.items() if a != alpha},
        **({"modules_to_save": list(modules_to_save)} if modules_to_save else {}),
    }


def _shorten(alpha: float) -> float:
    """A whole number as one, which is what PEFT writes and others declare."""
    return int(alpha) if float(alpha).is_integer() else alpha
