"""List the adapters below a directory: task, rank, targets, size, base, date, metric, and whether they are whole."""

from pathlib import Path

from lora_dist.adapter_config import ListConfig

CONFIG = ListConfig


def check(config: ListConfig) -> None:
    """ValueError where there is no such directory."""
    if not Path(config.directory).is_dir():
        raise ValueError(f"directory={config.directory} is not a directory; give directory=DIR")


def run(config: ListConfig) -> None:
    """Print the table; one process calls it."""
    from lora_dist.checkpoint.listing import format_table, list_adapters

    rows = list_adapters(Path(config.directory))
    print(format_table(rows) if rows else f"no adapters below {config.directory}", flush=True)
