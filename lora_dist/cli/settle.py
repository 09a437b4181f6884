"""What a configuration leaves to the job is settled before the model is built."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from lora_dist.config import RunConfig


def settle(config: RunConfig) -> RunConfig:
    """`config` with loop.recompute=auto replaced by the least that fits, which is printed.

    In a process of its own, started afresh: planning patches much of what training needs whole, and a forked process
    could not leave the GPU alone.
    """
    if config.loop.recompute != "auto":
        return config
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        settled = pool.submit(_choose_on_cpu, config).result()
    print(f"loop.recompute=auto: {settled.loop.recomputation} for method={config.method}", flush=True)
    return settled


def _choose_on_cpu(config: RunConfig) -> RunConfig:
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the planner imports deepspeed, which looks for a GPU
    from lora_dist.plan.recompute import choose_recompute

    return choose_recompute(config)
