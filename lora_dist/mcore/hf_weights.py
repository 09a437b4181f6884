"""Hugging Face weights into Megatron shards and back, one tensor at a time."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.carried import CarriedTensors
from lora_dist.files.directories import open_new_directory, read_json, write_json
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_layout import HfPart, split_to_hf
from lora_dist.files.hf_reader import CONFIG, INDEX, SINGLE_FILE, HfReader
from lora_dist.files.hf_wrappers import TEXT, find_wrapper
from lora_dist.files.quantization import QUANTIZATION
from lora_dist.files.safetensors_stream import open_writer
from lora_dist.files.tokenizer_files import (
    CHAT_TEMPLATE,
    OLD_CHAT_TEMPLATE,
    copy_generation_config,
    copy_processors,
    copy_tokenizer,
)
from lora_dist.lora.layer import compute_fused_rows, find_shared_ranges
from lora_dist.mcore.base_parameters import describe_weights, initialize_base, open_value
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter
from lora_dist.whole import (
    ReadState,
    WholeName,
    iterate_model,
    list_whole,
    read_by_expert,
    read_shard,
    read_value,
    with_constants,
    write_together,
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
    reader = HfReader(Path(directory), gpt.topology.device)
    for one in describe_weights(gpt):
        with open_value(one) as value:
            for part in HF_FAMILIES[gpt.model.family].find_parts(one.name, gpt.model):
                if part.interleaved:
                    _load_interleaved(gpt, value, part, reader)
                elif part.target is None:
                    _load_plain(gpt, one, value, part, reader)
                else:
                    _load_rows(gpt, value, part, reader)


def _load_rows(gpt: ShardedGpt, value: torch.Tensor, part: HfPart, reader: HfReader) -> None:
    """This rank's share of one target, to its rows of the fused parameter."""
    assert part.target is not None
    rows = compute_fused_rows(part.target, gpt.model, part.layer, gpt.topology.tp_size)
    assert rows is not None
    local_rows, tp_rank = rows[part.target], gpt.topology.tp_rank
    size = len(local_rows)
    shared = find_shared_ranges(gpt.model, gpt.topology.tp_size).get(part.target)
    start = tp_rank * size if shared is None else shared[tp_rank][0][0]
    stored = reader.read(part.name, dim=1 if part.transposed else 0, start=part.first + start, size=size)
    value[local_rows.to(gpt.topology.device)] = _to_local(stored, part, value)


def _load_plain(gpt: ShardedGpt, one: TrainableParameter, value: torch.Tensor, part: HfPart, reader: HfReader) -> None:
    dim = one.shard_dim
    if dim is None:
        value.copy_(_to_local(reader.read(part.name, entry=part.expert), part, value))
        return
    stored_dim = 1 - dim if part.transposed else dim

    def read(start: int, size: int) -> torch.Tensor:
        stored = reader.read(part.name, dim=stored_dim, start=start, size=size, entry=part.expert)
        return _to_local(stored, part, value)

    value.copy_(read_shard(read, one, gpt.topology))


def _load_interleaved(gpt: ShardedGpt, value: torch.Tensor, part: HfPart, reader: HfReader) -> None:
    """This rank's rows of gate and of up, which lie as pairs in one range."""
    size, dim = len(value), 1 if part.transposed else 0
    stored = reader.read(part.name, dim=dim, start=gpt.topology.tp_rank * size, size=size, entry=part.expert)
    local = _to_local(stored, part, value)
    value.copy_(torch.cat([local[::2], local[1::2]]))


def _to_local(stored: torch.Tensor, part: HfPart, value: torch.Tensor) -> torch.Tensor:
    """In the layout, dtype and device of the tensor to fill."""
    stored = stored[:, 0] if part.has_unit_dim else stored
    return (stored.t() if part.transposed else stored).to(value)


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
    keeps it elsewhere. The configuration, tokenizer, indexers and what sees pictures of `model.checkpoint` are kept.
    OSError, on every process, where the directory cannot be written; what was there stays.
    """
    trainable, topology, dtype = describe_weights(gpt), gpt.topology, gpt.config.params_dtype
    entries = list_whole(trainable, topology)
    family = HF_FAMILIES[model.family]
    shapes = family.compute_shapes(model)
    names = dict.fromkeys(part.name for entry in entries for part in family.find_parts(entry.name, model))
    dtypes = dict.fromkeys(names, dtype) | _find_kept_dtypes(entries, model)
    stream = iterate_model(entries, trainable, topology, read_by_expert(with_constants(read)), dtype)

    def write() -> None:
        carried = CarriedTensors(model, dtype)
        stored = {name: shapes[name] for name in names} | carried.shapes
        files = plan_files(stored, max_shard_bytes, dtype.itemsize)
        tensors = chain(_split_stream(stream, model), carried)
        with open_new_directory(Path(directory)) as temporary:
            _write_weights(temporary, files, tensors, dtypes | carried.dtypes, carried.find_stored_name)
            _write_config(temporary, model, dtype)

    write_together(write if topology.global_rank == 0 else None, stream)


def _find_kept_dtypes(entries: Sequence[WholeName], model: ModelConfig) -> dict[str, torch.dtype]:
    """By stored name, of what is written in a dtype of its own."""
    find_parts = HF_FAMILIES[model.family].find_parts
    kept = [(entry.name, entry.kept_dtype) for entry in entries if entry.kept_dtype is not None]
    return {part.name: dtype for name, dtype in kept for part in find_parts(name, model)}


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
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtypes: Mapping[str, torch.dtype],
    find_stored_name: Callable[[str], str],
) -> None:
    for file_name, shapes in files.items():
        stored = {find_stored_name(name): shape for name, shape in shapes.items()}
        own_dtypes = {find_stored_name(name): dtypes[name] for name in shapes}
        with open_writer(directory / file_name, stored, own_dtypes) as writer:
            num_elements = sum(map(prod, shapes.values()))
            while num_elements:
                name, tensor = next(tensors)
                writer.write_entries(find_stored_name(name), tensor)
                num_elements -= tensor.numel()
            writer.close()
    if len(files) > 1:
        weight_map = {find_stored_name(name): file_name for file_name, shapes in files.items() for name in shapes}
        sizes = [prod(shape) * dtypes[name].itemsize for shapes in files.values() for name, shape in shapes.items()]
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _split_stream(
    stream: Iterator[tuple[str, torch.Tensor | None]], model: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored names and tensors, or entries of tensors, out of canonical ones, in their order."""
    for canonical_name, whole in stream:
        assert whole is not None
        parts = HF_FAMILIES[model.family].find_parts(canonical_name, model)
        yield from split_to_hf(whole, parts, model).items()


def _write_config(directory: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    """config.json (the source's where there is one), the code that it names and the tokenizer's files."""
    source, family = None if model.checkpoint is None else Path(model.checkpoint), HF_FAMILIES[model.family]
    config = family.describe(model) if source is None else read_json(source / CONFIG)
    wrapper = find_wrapper(config)
    text = config if wrapper is None else config[TEXT]
    for section in (config, text):
        section.pop("torch_dtype", None)  # an older name of dtype
        section.pop(QUANTIZATION, None)
        section["dtype"] = str(dtype).removeprefix("torch.")
    text.update(family.without_extra)
    if wrapper is None:
        config["architectures"] = [family.architecture]
    write_json(directory / CONFIG, config)
    if source is not None and "auto_map" in config:
        for path in source.glob("*.py"):
            shutil.copyfile(path, directory / path.name)
    if source is not None:
        copy_generation_config(source, directory)
        copy_processors(source, directory)
    tokenizer = source if model.tokenizer is None else Path(model.tokenizer)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory)
    if model.chat_template is not None:
        (directory / OLD_CHAT_TEMPLATE).unlink(missing_ok=True)
        shutil.copyfile(model.chat_template, directory / CHAT_TEMPLATE)
