"""The DeepSpeed configuration of a run; a pure function."""

from typing import Any

from lora_dist.config import OptimConfig, ZeroConfig

_MAX_BUCKET_ELEMENTS = 2**26


def build_ds_config(
    zero: ZeroConfig, optim: OptimConfig, *, micro_batch_size: int, master_dtype: str, num_trainable: int, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON configuration as a dict.

    `master_dtype` is fp32 where the trainable parameters are fp32 themselves (adapters always), else the bf16 or fp16
    of parameters that need fp32 masters. Stage 0 leaves clipping to `gradients.compute_grad_norm`: DeepSpeed's
    own would count the tied embedding of a pipeline twice there. `num_trainable`, elements on this process, bounds
    the buffer that gradients are reduced in: DeepSpeed's default takes 2 GB of a GPU whatever trains. All gradients
    are reduced after the last backward, so there is nothing to overlap that with.
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
            "overlap_comm": False,
            "reduce_bucket_size": min(num_trainable, _MAX_BUCKET_ELEMENTS),
        },
    }
    if zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if master_dtype == "bf16":
        config["bf16"] = {"enabled": True}
        # fp32 accumulation would select an optimizer wrapper that cannot coalesce the microbatches' reductions.
        config["data_types"] = {"grad_accum_dtype": "bf16"}
    if master_dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 1}
    return config
