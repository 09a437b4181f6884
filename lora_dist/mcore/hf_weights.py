"""Hugging Face GPT-2 weights into Megatron shards and back, one tensor at a time."""

import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.directories import open_new_directory, read_json, write_json
from lora_dist.files.hf_checkpoint import CONFIG, INDEX, SINGLE_FILE, HfReader, describe_hf_config
from lora_dist.files.hf_gpt2 import PREFIX, QKV_TARGETS, HfTensor, compute_hf_shapes, find_hf_tensor, to_hf_layout
from lora_dist.files.safetensors_stream import open_writer
from lora_dist.lora.layer import compute_qkv_rows
from lora_dist.mcore.base_parameters import describe_base_parameters, initialize_base, open_value
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter
from lora_dist.whole import ReadState, compute_shard_range, iterate_model, list_whole, read_value, write_together

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def fill_base(gpt: ShardedGpt, model: ModelConfig, *, seed: int) -> None:
    """Pretrained weights, or drawn from the seed where the model names no checkpoint."""
    if model.checkpoint is None:
        initialize_base(gpt, model, seed)
    else:
        load_hf_checkpoint(gpt, model.checkpoint)


@torch.no_grad()
def load_hf_checkpoint(gpt: ShardedGpt, directory: str | Path) -> None:
    """Fill this process's shard from a directory that `check_hf_checkpoint` has passed.

    Each process reads only its own part of one tensor at a time. Rows that pad the vocabulary become zero.
    """
    reader = HfReader(Path(directory))
    for one in describe_base_parameters(gpt):
        hf = find_hf_tensor(one.name)
        with open_value(one) as value:
            (_load_qkv if hf.is_qkv else _load_plain)(gpt, one, value, hf, reader)


def _load_qkv(gpt: ShardedGpt, one: TrainableParameter, value: torch.Tensor, hf: HfTensor, reader: HfReader) -> None:
    """This rank's heads of q, then of k, then of v, to their rows."""
    config, topology = gpt.config, gpt.topology
    local_heads = config.num_attention_heads // topology.tp_size
    size = local_heads * config.kv_channels
    for index, (target, rows) in enumerate(compute_qkv_rows(local_heads, 1, config.kv_channels).items()):
        assert target == QKV_TARGETS[index]
        start = index * config.hidden_size + topology.tp_rank * size
        part = reader.read(hf.name, dim=len(one.full_shape) - 1, start=start, size=size)
        value[rows.to(topology.device)] = _to_local(part, hf, value)


def _load_plain(gpt: ShardedGpt, one: TrainableParameter, value: torch.Tensor, hf: HfTensor, reader: HfReader) -> None:
    if one.shard_dim is None:
        value.copy_(_to_local(reader.read(hf.name), hf, value))
        return
    start, size = compute_shard_range(one, gpt.topology)
    value.zero_()
    if size:
        stored_dim = 1 - one.shard_dim if hf.transposed else one.shard_dim
        part = reader.read(hf.name, dim=stored_dim, start=start, size=size)
        value.narrow(one.shard_dim, 0, size).copy_(_to_local(part, hf, value))


def _to_local(part: torch.Tensor, hf: HfTensor, value: torch.Tensor) -> torch.Tensor:
    """In the layout, dtype and device of the tensor to fill."""
    return (part.t() if hf.transposed else part).to(value)


def write_hf_checkpoint(
    gpt: ShardedGpt,
    directory: str | Path,
    *,
    model: ModelConfig,
    max_shard_bytes: int = 5 * 10**9,
    read: ReadState = read_value,
) -> None:
    """The whole base as a directory transformers loads, in the dtype the shards have. Every process calls it.

    Global rank 0 writes, and holds one whole tensor at a time. `read` gives a parameter's local "value" where ZeRO
    keeps it elsewhere. The configuration and tokenizer of `model.checkpoint` are kept. OSError, on every process,
    where the directory cannot be written; what was there stays.
    """
    trainable, topology, dtype = describe_base_parameters(gpt), gpt.topology, gpt.config.params_dtype
    entries = list_whole(trainable, topology)
    shapes = compute_hf_shapes(model)
    names = [find_hf_tensor(entry.name).name for entry in entries]
    files = plan_files({name: shapes[name] for name in names}, max_shard_bytes, dtype.itemsize)
    stream = iterate_model(entries, trainable, topology, read, dtype)

    def write() -> None:
        with open_new_directory(Path(directory)) as temporary:
            _write_weights(temporary, files, stream, dtype, model.num_heads)
            _write_config(temporary, model, dtype)

    write_together(write if topology.global_rank == 0 else None, stream)


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], max_shard_bytes: int, itemsize: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors and shapes, in order; a file exceeds the limit only where one tensor does."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * itemsize
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _write_weights(
    directory: Path,
    files: Mapping[str, Mapping[str, tuple[int, ...]]],
    stream: Iterator[tuple[str, torch.Tensor | None]],
    dtype: torch.dtype,
    num_heads: int,
) -> None:
    for file_name, shapes in files.items():
        stored = {PREFIX + name: shape for name, shape in shapes.items()}
        with open_writer(directory / file_name, stored, dtype) as writer:
            for _ in shapes:
                canonical_name, whole = next(stream)
                assert whole is not None
                hf = find_hf_tensor(canonical_name)
                writer.write(PREFIX + hf.name, to_hf_layout(whole, hf, num_heads))
            writer.close()
    if len(files) > 1:
        weight_map = {PREFIX + name: file_name for file_name, shapes in files.items() for name in shapes}
        num_elements = sum(prod(shape) for shapes in files.values() for shape in shapes.values())
        write_json(
            directory / INDEX, {"metadata": {"total_size": num_elements * dtype.itemsize}, "weight_map": weight_map}
        )


def _write_config(directory: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    """config.json (what the source's says beyond the sizes is kept) and the tokenizer's files."""
    source = None if model.checkpoint is None else Path(model.checkpoint)
    config = {} if source is None else read_json(source / CONFIG)
    write_json(directory / CONFIG, config | describe_hf_config(model) | {"dtype": str(dtype).removeprefix("torch.")})
    tokenizer = source if model.tokenizer is None else Path(model.tokenizer)
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
