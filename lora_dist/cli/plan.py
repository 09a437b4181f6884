"""Say what each GPU of a job will hold, compute and send, or which topologies fit; needs no GPU and no files."""

import os

from lora_dist.cli.settle import settle
from lora_dist.config import RunConfig


def run(config: RunConfig) -> None:
    """Print the table, and write plan.json and memory.png, or search.json, into the run directory."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # fake tensors, whatever this machine has
    from lora_dist.plan.job import include_own_recompute, list_variants, plan_jobs
    from lora_dist.plan.report import write_plan, write_search
    from lora_dist.plan.search import search_topologies
    from lora_dist.run_dir import prepare_run_dir

    config, left_out = include_own_recompute(config)
    if left_out is not None:
        print(left_out, flush=True)
    if config.plan.search:
        candidates = search_topologies(config)
        prepare_run_dir(config)
        print(write_search(config, candidates))
        return
    jobs = plan_jobs([settle(variant) for variant in list_variants(config)])
    prepare_run_dir(config)
    print(write_plan(config, jobs))
