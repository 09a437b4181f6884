"""A live model's adapter out of its shards into a directory of the store, and back into shards of any topology."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_dist.checkpoint.identity import check_same
from lora_dist.checkpoint.store import Adapter, describe_adapter, open_adapter, write_adapter_directory
from lora_dist.config import ModelConfig
from lora_dist.lora.pissa import subtract_initial
from lora_dist.lora.spec import AdapterSpec
from lora_dist.parameters import TrainableParameter, find_source
from lora_dist.topology import Topology
from lora_dist.whole import ReadState, cut_shard, iterate_model, list_whole, with_constants, write_together


def write_adapter(
    directory: str | Path,
    *,
    trainable: Sequence[TrainableParameter],
    specs: Sequence[AdapterSpec],
    topology: Topology,
    model: ModelConfig,
    bias: str,
    read: ReadState,
    base_fingerprint: str,
    task: str,
    step: int,
    metrics: Mapping[str, float | None],
    constants: Sequence[TrainableParameter] = (),
    modules: Sequence[str] = (),
    layout: str = "peft",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Every process calls it; global rank 0 writes. What stood in `directory` is replaced once the new one is whole.

    `read` gives a parameter's local fp32 "value" (`ZeroEngine.read_state`, or `whole.read_value`). fp32 files hold
    what was trained bit for bit; where `constants` hold PiSSA's initial factors, those are subtracted from it in twice
    the rank. OSError, on every process, where the directory cannot be written.
    """
    everything, read_all = [*trainable, *constants], with_constants(read)

    def read_one(one: TrainableParameter) -> dict[str, torch.Tensor]:
        return {"value": read_all(one)["value"]}

    stream = iterate_model(list_whole(everything, topology), everything, topology, read_one, torch.float32)

    def write() -> None:
        values = {name: whole for name, whole in stream if whole is not None}
        kept_specs, kept = subtract_initial(specs, values)
        write_adapter_directory(
            Path(directory),
            Adapter(specs=kept_specs, bias=bias, values=kept, modules=modules),
            model,
            {"task": task, "step": step, "metrics": dict(metrics)},
            base_fingerprint=base_fingerprint,
            layout=layout,
            dtype=dtype,
        )

    write_together(write if topology.global_rank == 0 else None, stream)


@torch.no_grad()
def load_adapter(
    directory: str | Path,
    *,
    trainable: Sequence[TrainableParameter],
    specs: Sequence[AdapterSpec],
    topology: Topology,
    model: ModelConfig,
    bias: str,
    base_fingerprint: str,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Fill this process's factors and biases before an optimizer is built over them; returns the manifest.

    Nothing is changed unless the whole file fits: ValueError for a damaged file, another base, another adapter.
    """
    stored = open_adapter(Path(directory), model=model, base_fingerprint=base_fingerprint)
    check_same(describe_adapter(specs, bias, base_fingerprint, modules), stored.manifest, stored.directory)
    values = stored.read().values
    for one in trainable:
        whole = values[find_source(one)]
        assert tuple(whole.shape) == one.full_shape
        one.parameter.copy_(cut_shard(whole, one, topology))
    return stored.manifest
