"""The DeepSpeed configuration of a run; a pure function."""

from typing import Any

from lora_dist.config import OptimConfig, ZeroConfig
from lora_dist.zero.loss_scale import INITIAL_SCALE

_MAX_BUCKET_ELEMENTS = 200_000_000
"""Of gradients reduced in one collective: 400 MB in half precision."""


def build_ds_config(
    zero: ZeroConfig,
    optim: OptimConfig,
    *,
    micro_batch_size: int,
    num_trainable: int,
    master_dtype: str,
    on_gpu: bool,
) -> dict[str, Any]:
    """DeepSpeed's JSON configuration as a dict.

    `num_trainable` counts this process's elements. `master_dtype` is fp32 where the trainable parameters are fp32
    themselves (adapters always), else the bf16 or fp16 of parameters that need fp32 masters. Stage 0 leaves
    clipping to `gradients.compute_grad_norm`: DeepSpeed's own would count the tied embedding of a pipeline twice there.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_grad_norm if zero.stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": zero.stage,
            # All gradients are reduced after the last backward; overlapping would only take a second buffer.
            "overlap_comm": False,
            # DeepSpeed sets aside a buffer of this many elements, whatever there is to reduce.
            "reduce_bucket_size": max(1, min(num_trainable, _MAX_BUCKET_ELEMENTS)),
        },
    }
    if zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if master_dtype == "bf16":
        config["bf16"] = {"enabled": True}
        # fp32 accumulation would select an optimizer wrapper that cannot coalesce the microbatches' reductions.
        config["data_types"] = {"grad_accum_dtype": "bf16"}
    if master_dtype == "fp16":
        # Not 0, which is DeepSpeed's dynamic scale: `LossScale` sets it from step to step.
        config["fp16"] = {"enabled": True, "loss_scale": INITIAL_SCALE}
    return config
