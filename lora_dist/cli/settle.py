"""What a configuration leaves to the job is settled before the model is built."""

from lora_dist.config import RunConfig


def settle(config: RunConfig) -> RunConfig:
    """`config` with loop.recompute=auto replaced; the planner is imported where it is asked, and only there."""
    if config.loop.recompute != "auto":
        return config
    from lora_dist.plan.recompute import settle_recompute

    return settle_recompute(config)
