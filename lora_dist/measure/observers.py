"""Where a run's numbers go while it runs: metrics.jsonl, W&B and the terminal, all from global rank 0."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lora_dist.classify_config import ClassifyConfig
from lora_dist.config import RunConfig
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.meter import Meter
from lora_dist.measure.metrics_file import MetricsFile
from lora_dist.measure.progress import Progress
from lora_dist.measure.wandb_sink import open_wandb
from lora_dist.topology import Topology
from lora_dist.writing import format_json, write_text

Observe = Callable[[dict[str, float | int | bool | None]], None]


@contextmanager
def open_observers(
    config: RunConfig | ClassifyConfig, topology: Topology, meter: Meter, *, name: str, num_steps_done: int
) -> Iterator[Observe]:
    """The function that takes each step's metrics, every process's; the meter's numbers are those of this process."""
    if topology.global_rank != 0:
        yield lambda metrics: None
        return
    run_dir = Path(config.run_dir)
    write_text(run_dir / "environment.json", format_json(describe_environment()))
    with (
        MetricsFile(run_dir / "metrics.jsonl", num_steps_done=num_steps_done) as file,
        open_wandb(config.track, run_dir, asdict(config), name=name, global_rank=0) as tracker,
        Progress(name, num_steps=config.loop.total_steps, num_steps_done=num_steps_done) as progress,
    ):

        def observe(metrics: dict[str, float | int | bool | None]) -> None:
            line = {**metrics, **(meter.last() if metrics["step"] != 0 else {})}
            file.write(line)
            tracker.log_step(line)
            progress.show(line)

        yield observe
