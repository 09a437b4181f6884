"""Check on every node, in seconds, that the run can start there: devices, memory, paths, versions."""

from lora_dist.config import RunConfig


def run(config: RunConfig) -> None:
    """Every process calls it; lora_dist.preflight is imported late because it brings torch."""
    from lora_dist.preflight import check_job

    report = check_job(config)
    if report is not None:
        print(report, flush=True)
