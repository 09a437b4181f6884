"""loop.recompute=auto: the least recomputation that fits the GPU, found layer by layer on the plan's own account."""

import math
from dataclasses import replace

from lora_dist.base_shapes import list_stages
from lora_dist.config import RunConfig
from lora_dist.plan.job import GIB, JobPlan, plan_jobs


def choose_recompute(config: RunConfig) -> RunConfig:
    """None where that fits; else the kind and the fewest layers of each stage by the best predicted step time.

    ValueError with the bytes where the job does not fit with every layer recomputed either.
    """
    plain = _recompute(config, "none", None)
    without = _plan(plain)
    if without.fits:
        return plain
    found = {kind: _find_fewest_layers(config, kind, without) for kind in ("selective", "full")}
    fitting = {kind: one for kind, one in found.items() if one[1].fits}
    if not fitting:
        job = found["full"][1]
        raise ValueError(
            f"loop.recompute=auto: {job.needed_bytes / GIB:.2f} GiB with every layer recomputed,"
            f" {without.needed_bytes / GIB:.2f} without, and the GPU has {job.memory_bytes / GIB:.2f};"
            " use more GPUs (plan.search=true lists topologies that fit) or a smaller loop.micro_batch_size"
        )
    kind = min(fitting, key=lambda kind: fitting[kind][1].step_seconds)
    return _recompute(config, kind, fitting[kind][0])


def _find_fewest_layers(config: RunConfig, kind: str, without: JobPlan) -> tuple[int, JobPlan]:
    """The fewest layers of a stage with which it fits, and that job; all layers where not even they suffice.

    Every layer saves about the same, so a straight line between two tries says where to try next.
    """
    low, below = 0, without
    high = _count_most_layers(config)
    above = _plan(_recompute(config, kind, high))
    while above.fits and high - low > 1:
        saved = (below.needed_bytes - above.needed_bytes) / (high - low)
        missing = math.ceil((below.needed_bytes - above.memory_bytes) / saved)
        tried = min(max(low + missing, low + 1), high - 1)
        job = _plan(_recompute(config, kind, tried))
        if job.fits:
            high, above = tried, job
        else:
            low, below = tried, job
    return high, above


def _plan(config: RunConfig) -> JobPlan:
    [job] = plan_jobs([config])
    return job


def _recompute(config: RunConfig, kind: str, num_layers: int | None) -> RunConfig:
    """All layers of a stage are what None says too."""
    if num_layers == _count_most_layers(config):
        num_layers = None
    return replace(config, loop=replace(config.loop, recompute=kind, recompute_layers=num_layers))


def _count_most_layers(config: RunConfig) -> int:
    """Of a stage."""
    return max(map(len, list_stages(config.model, config.topology.pp_size)))
