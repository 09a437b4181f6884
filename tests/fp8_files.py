"""A checkpoint as DeepSeek-V3 and the Qwen3-FP8 are published, and the values that it stands for, in plain torch."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_NATIVE = ("embed", "lm_head", "wte", "wpe", ".gate.weight")
"""Parts of the names of embeddings, output layers and routers, which are never published in fp8."""


def write_fp8_checkpoint(
    source: Path,
    target: Path,
    plain: Path,
    *,
    block_size: tuple[int, int],
    scale_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """`source`, in one file, with its linears in fp8 in `target` and their dequantised values, which it gives back, in
    `plain`. What stays native has `dtype` in both.
    """
    stored, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() == 2 and not any(part in name for part in _NATIVE):
            stored[name], scales, values[name] = quantize(tensor.float(), block_size, scale_dtype)
            stored[f"{name}_scale_inv"] = scales
        else:
            values[name] = stored[name] = tensor if "correction_bias" in name else tensor.to(dtype)
    assert len(values) < len(stored)
    for directory in (target, plain):
        shutil.copytree(source, directory)
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    (target / "model.safetensors").unlink()
    write_two_files(target, stored)
    config = json.loads((target / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block_size)}
    settings = {"dtype": "bfloat16", "quantization_config": fp8}
    (target / "config.json").write_text(json.dumps(config | settings))
    return values


def write_two_files(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every second tensor in one file, so that the most weights do not lie beside their scales."""
    names = sorted(tensors)
    places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name].contiguous() for name in names if places[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def quantize(
    weight: torch.Tensor, block_size: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In e4m3, the scales, and what they stand for in fp32; block by block."""
    (rows, columns), stored, values = block_size, torch.empty_like(weight, dtype=torch.float8_e4m3fn), weight.clone()
    grid = [range(0, size, block) for size, block in zip(weight.shape, block_size, strict=True)]
    scales = torch.empty(len(grid[0]), len(grid[1]), dtype=scale_dtype)
    for i, row in enumerate(grid[0]):
        for j, column in enumerate(grid[1]):
            place = (slice(row, row + rows), slice(column, column + columns))
            scales[i, j] = weight[place].abs().max() / 448
            scale = scales[i, j].float()
            stored[place] = (weight[place] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            values[place] = stored[place].float() * scale
    return stored, scales, values
