"""What one process of a job will hold at the least: as its plan says, or else its weights and what trains with them."""

import json
from math import prod
from pathlib import Path
from typing import Any

from lora_dist.base_format import LinearShape, compute_weight_bytes, find_linear_format
from lora_dist.base_shapes import compute_indexer_shapes, compute_layer_shapes, count_elements, list_stage_layers
from lora_dist.config import ModelConfig, RunConfig, compute_dp_size
from lora_dist.lora.targets import WHOLE_TARGETS, compute_linear_shapes, find_num_experts
from lora_dist.topology import compute_coordinates

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def compute_needed_bytes(config: RunConfig, global_rank: int, world_size: int) -> int:
    """Of the device, CUDA's and NCCL's own left out. ValueError where `plan.file` plans another job."""
    dp_size = compute_dp_size(config.topology, world_size)
    topology = config.topology
    place = compute_coordinates(global_rank, tp_size=topology.tp_size, cp_size=topology.cp_size, dp_size=dp_size)
    if config.plan.file is not None:
        return _read_planned_bytes(config, config.plan.file, place.pp_rank, dp_size)
    return compute_state_bytes(config, place.pp_rank, dp_size)


def compute_state_bytes(config: RunConfig, pp_rank: int, dp_size: int) -> int:
    """This process's weights, and where they train, their gradients and optimizer state."""
    layers = list_stage_layers(config.model, pp_rank, config.topology.pp_size)
    num_whole = _count_whole(config.model, layers)
    num_parameters = num_whole + (_count_stage(config.model, layers) - num_whole) // config.topology.tp_size
    stage, element, num_partitions = config.zero.stage, _BYTES[config.dtype], dp_size * config.topology.cp_size
    needed = num_parameters * element // (num_partitions if stage == 3 else 1)
    needed -= compute_format_savings(config.model, element, config.topology.tp_size, layers)
    if config.model.selects(config.data.seq_len):
        num_indexers = sum(map(config.model.has_indexer, layers))
        needed += num_indexers * sum(map(prod, compute_indexer_shapes(config.model).values())) * element
    if config.method == "full":
        needed += num_parameters * element // (num_partitions if stage >= 2 else 1)
        if not config.zero.offload_optimizer:
            masters_and_moments = 8 if config.dtype == "fp32" else 12
            needed += num_parameters * masters_and_moments // (num_partitions if stage >= 1 else 1)
    return needed


def compute_format_savings(model: ModelConfig, native_itemsize: int, tp_size: int, layers: range) -> int:
    """Bytes by which the shard of these layers is smaller for model.base_format; exact."""
    saved = 0
    for layer in layers:
        for target, (in_features, out_features) in compute_linear_shapes(model, layer).items():
            column_parallel = not target.endswith(("o_proj", "out_proj", "down_proj"))
            whole = LinearShape(out_features=out_features, in_features=in_features, column_parallel=column_parallel)
            shard = whole.cut(1 if target in WHOLE_TARGETS else tp_size)
            num_experts = find_num_experts(target, model, layer)
            base_format = find_linear_format(model.base_format, of_experts=num_experts is not None)
            stored = compute_weight_bytes(base_format, shard, native_itemsize)
            saved += (shard.num_elements * native_itemsize - stored) * (num_experts or 1)
    return saved


def _count_stage(model: ModelConfig, layers: range) -> int:
    """Parameters of one pipeline stage; the first holds the embedding, the last the output layer or its tied copy."""
    vocabulary, kind = model.vocab_size * model.hidden_size, model.architecture
    counted = sum(count_elements(compute_layer_shapes(model, layer)) for layer in layers)
    is_first, is_last = layers.start == 0, layers.stop == model.num_layers
    if is_first and not kind.rotary:
        counted += (model.max_position_embeddings + kind.position_offset) * model.hidden_size
    if is_last:
        counted += (1 if kind.rms_norm else 2) * model.hidden_size
    is_whole = is_first and is_last
    return counted + vocabulary * (is_first + is_last - (is_whole and model.tied_output))


def _count_whole(model: ModelConfig, layers: range) -> int:
    """Parameters of the linears that every TP rank holds whole."""
    linears = [item for layer in layers for item in compute_linear_shapes(model, layer).items()]
    return sum(prod(shape) for target, shape in linears if target in WHOLE_TARGETS)


def _read_planned_bytes(config: RunConfig, file: str, pp_rank: int, dp_size: int) -> int:
    """The peak on this stage; with loop.recompute=auto, which recomputes what it must, the least that is planned."""
    topology = config.topology
    wanted: dict[str, Any] = {
        **{"method": config.method, "dp_size": dp_size},
        **{"tp_size": topology.tp_size, "cp_size": topology.cp_size, "pp_size": topology.pp_size},
    }
    if config.loop.recompute != "auto":
        wanted["recompute"] = config.loop.recomputation
    jobs = [job for job in _read_jobs(Path(file)) if all(job.get(key) == value for key, value in wanted.items())]
    processes = [process for job in jobs for process in job["processes"] if pp_rank in process.get("pp_ranks", ())]
    if processes:
        return min(int(process["peak_bytes"]) for process in processes)
    described = ", ".join(f"{key}={value}" for key, value in wanted.items())
    raise ValueError(f"plan.file={file} plans no job with {described}; write it with `lora-dist plan` of this very job")


def _read_jobs(file: Path) -> list[dict[str, Any]]:
    try:
        jobs: list[dict[str, Any]] = json.loads(file.read_bytes())["jobs"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"plan.file={file} cannot be read as a plan.json ({error})") from None
    return [{"cp_size": 1, **job} for job in jobs]  # which plans of earlier versions do not name
