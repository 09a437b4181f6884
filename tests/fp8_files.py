"""Checkpoints in fp8 and int4 as they are published, and the values that they stand for, in plain torch."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_NATIVE = ("embed", "lm_head", "wte", "wpe", ".gate.weight", "indexer.weights_proj")
"""Parts of the names of embeddings, output layers, routers and what is like one, which are never published in fp8."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a package writes: config.json's quantization_config, and which tensors."""

    settings: dict[str, Any]
    block: tuple[int | None, int | None] | None = None
    """Rows and columns of a weight in fp8 that share a scale; None is all of them. Without, none is in fp8."""
    int4_group: int = 0
    """Neighbours in a row of a weight in int4 that share a scale."""
    in_int4: str = "no weight"
    """A part of the names of those."""
    suffix: str = "_scale"
    tensor_shape: tuple[int, ...] = (1, 1)
    """Of the scale of a whole tensor."""
    of_activations: str | None = None
    of_cache: tuple[str, ...] = ()


def describe_blocks(block_size: tuple[int, int]) -> Layout:
    """DeepSeek-V3's, Qwen3-FP8's."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return Layout(settings=settings | {"weight_block_size": list(block_size)}, block=block_size, suffix="_scale_inv")


def describe_compressed(*groups: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """compressed-tensors 0.20.1's, of groups that state their weights."""
    numbers = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
    inputs = {**numbers, "strategy": "token", "dynamic": True}
    common = {"targets": ["Linear"], "input_activations": inputs, "output_activations": None, "format": None}
    return {
        "config_groups": {
            f"group_{number}": {**common, **group, "weights": {**numbers, **group["weights"]}}
            for number, group in enumerate(groups)
        },
        **{"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"},
        **{"kv_cache_scheme": None, "global_compression_ratio": None, "ignore": ["lm_head"], "version": "0.20.1"},
        **{"sparsity_config": {}, "transform_config": {}, "moe_sparsity_config": None},
        **settings,
    }


_STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_INT4 = {
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    "input_activations": None,
}
_IGNORED = {"modules_to_not_convert": ["lm_head"]}
LAYOUTS = {
    "compressed_row": Layout(settings=describe_compressed({"weights": {"strategy": "channel"}}), block=(1, None)),
    "compressed_block": Layout(
        settings=describe_compressed({"weights": {"strategy": "block", "block_structure": [7, 5]}}), block=(7, 5)
    ),
    "compressed_tensor": Layout(
        settings=describe_compressed(
            {"weights": {"strategy": "tensor"}, "input_activations": _STATIC}, kv_cache_scheme=_STATIC
        ),
        block=(None, None),
        tensor_shape=(1,),
        of_activations="input_scale",
        of_cache=("self_attn.k_scale", "self_attn.v_scale"),
    ),
    "compressed_weights_alone": Layout(
        settings=describe_compressed(
            {"weights": {"strategy": "channel"}, "input_activations": None}, format="naive-quantized"
        ),
        block=(1, None),
    ),
    "int4": Layout(settings=describe_compressed(_INT4, format="pack-quantized"), int4_group=16, in_int4="weight"),
    "int4_experts": Layout(
        settings=describe_compressed(_INT4, format="pack-quantized"), int4_group=16, in_int4=".experts."
    ),
    "int4_and_fp8": Layout(
        settings=describe_compressed(
            {"weights": {"strategy": "channel"}, "format": "float-quantized"},
            {**_INT4, "targets": ["re:.*experts.*"], "format": "pack-quantized"},
            format="mixed-precision",
        ),
        block=(1, None),
        int4_group=16,
        in_int4=".experts.",
    ),
    "fbgemm": Layout(
        settings={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, **_IGNORED}, block=(1, None)
    ),
    "autofp8": Layout(
        settings={
            **{"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
            **{"kv_cache_scheme": "static"},
        },
        block=(None, None),
        tensor_shape=(),
        of_activations="input_scale",
        of_cache=("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ),
    "autofp8_dynamic": Layout(
        settings={"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        block=(None, None),
        tensor_shape=(),
    ),
    "minimax": Layout(
        settings={
            **{"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic"},
            **{"weight_block_size": [9, 7]},
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        block=(9, 7),
        suffix="_scale_inv",
    ),
    "mistral": Layout(
        settings={
            **{"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
            **_IGNORED,
        },
        block=(None, None),
        suffix="_scale_inv",
        tensor_shape=(),
        of_activations="activation_scale",
    ),
}
"""What is not in blocks under quant_method fp8: from the packages' sources, and compressed-tensors' own files."""


def write_fp8_checkpoint(
    source: Path,
    target: Path,
    plain: Path,
    *,
    block_size: tuple[int, int] | None = None,
    layout: Layout | None = None,
    scale_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """`source`, in one file, with its linears quantised in `target` and their dequantised values, which it gives back,
    in `plain`. What stays native has `dtype` in both. Of a layout, or in blocks of a size.
    """
    layout = layout or describe_blocks(block_size or (128, 128))
    stored, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        is_linear = tensor.dim() == 2 and not any(part in name for part in _NATIVE)
        parts, value = _store(name, tensor.float(), layout, scale_dtype) if is_linear else ({}, tensor)
        if not parts and "correction_bias" not in name:
            value = tensor.to(dtype)
        values[name] = value
        stored |= parts or {name: value}
    assert len(values) < len(stored)
    for layer in [name.removesuffix("input_layernorm.weight") for name in values if "input_layernorm" in name]:
        stored |= {f"{layer}{one}": torch.full(layout.tensor_shape, 9.0) for one in layout.of_cache}
    for directory in (target, plain):
        shutil.copytree(source, directory)
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    (target / "model.safetensors").unlink()
    write_two_files(target, stored)
    config = json.loads((target / "config.json").read_text())
    settings = {"dtype": "bfloat16", "quantization_config": layout.settings}
    (target / "config.json").write_text(json.dumps(config | settings))
    return values


def _store(
    name: str, weight: torch.Tensor, layout: Layout, scale_dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that stand for a linear's weight, none where it stays native, and its values."""
    if layout.in_int4 in name:
        words, scales, values = pack_int4(weight, layout.int4_group, scale_dtype)
        shape = torch.tensor(weight.shape)
        return {f"{name}_packed": words, f"{name}_scale": scales, f"{name}_shape": shape}, values
    if layout.block is None:
        return {}, weight
    block = layout.block[0] or weight.shape[0], layout.block[1] or weight.shape[1]
    stored, scales, values = quantize(weight, block, scale_dtype)
    parts = {name: stored, name + layout.suffix: scales if layout.block[0] else scales.view(layout.tensor_shape)}
    if layout.of_activations is not None:
        parts[name.replace("weight", layout.of_activations)] = torch.full(layout.tensor_shape, 7.0)
    return parts, values


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


def pack_int4(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales, and what they stand for in fp32; a byte has two codes, the low half first."""
    groups = weight.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1) / 7).to(scale_dtype)
    whole = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    codes = (whole + 8).to(torch.uint8).flatten(1)
    words = (codes[:, ::2] + 16 * codes[:, 1::2]).view(torch.int32)
    return words, scales, (whole * scales.float()[..., None]).flatten(1)
