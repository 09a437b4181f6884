"""The tensors of a Hugging Face checkpoint, in whatever files and format: found by name and read in parts."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lora_dist.base_format import MXFP4_BLOCK
from lora_dist.files.directories import read_json
from lora_dist.files.fp8_blocks import dequantize_blocks, find_blocks, find_scales, is_inference_scale
from lora_dist.files.hf_gpt2 import PREFIX
from lora_dist.files.hf_wrappers import BESIDE, find_layout, find_wrapper, get_text_config, to_stored_name, to_text_name
from lora_dist.files.int4_groups import find_int4, unpack_int4
from lora_dist.files.mxfp4_blocks import compute_shape, find_packed, is_mxfp4
from lora_dist.files.quantization import (
    CODES_PER_WORD,
    QUANTIZATION,
    Quantization,
    find_original_dtype,
    read_quantization,
)
from lora_dist.files.safetensors_stream import TensorInfo, read_header, read_part
from lora_dist.quant.blocks import dequantize_mxfp4

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class HfReader:
    """Finds tensors by their names without `transformer.`, in one file or several, and reads parts of them.

    Where the text model is a part of the checkpoint, its tensors have the names that they have in one of its own, and
    BESIDE stands in front of all others.

    What is stored in fp8 or int4 with scales appears as the one weight that it was, of the dtype that it had; what is
    in MXFP4 as the one that it is, in bf16.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        """Reads every header; what is stored in fp8, int4 or MXFP4 is dequantised on `device`.

        ValueError where a file is missing, damaged, or does not hold what the index says.
        """
        self.directory, self.shapes, self.dtypes, self._device = directory, {}, {}, device
        self._places: dict[str, TensorInfo] = {}
        headers = {path: read_header(path) for path in find_weight_files(directory)}
        config = read_json(directory / CONFIG)
        self._layout = find_layout(chain(*headers.values()), directory) if find_wrapper(config) else None
        for path, header in headers.items():
            for stored_name, info in header.items():
                name = self._name(stored_name)
                if name in self._places:
                    raise ValueError(f"{path} holds {stored_name} a second time; {self._places[name].path} has it too")
                self._places[name] = info
                self.shapes[name], self.dtypes[name] = info.shape, info.dtype
        config = get_text_config(config, directory / CONFIG)
        files = {name: info.path for name, info in self._places.items()}
        self._hide_codes(config, files)
        self._hide_scales(config, files)

    def _name(self, stored_name: str) -> str:
        if self._layout is None:
            return stored_name.removeprefix(PREFIX)
        text_name = to_text_name(stored_name, self._layout)
        return f"{BESIDE}{stored_name}" if text_name is None else text_name

    def find_stored_name(self, name: str) -> str:
        """Of a tensor of this checkpoint or a text model's, in the files of one in which that is a part."""
        assert self._layout is not None
        return name.removeprefix(BESIDE) if name.startswith(BESIDE) else to_stored_name(name, self._layout)

    def _hide_codes(self, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self._packed = find_packed(self.shapes, self.dtypes, files)
        if self._packed and not is_mxfp4(config):
            raise ValueError(
                f"{self.directory} holds {next(iter(self._packed))} in MXFP4, of which the {QUANTIZATION} in {CONFIG}"
                f" says nothing; copy {CONFIG} again"
            )
        for weight, parts in self._packed.items():
            self.shapes[weight], self.dtypes[weight] = compute_shape(self.shapes[parts[1]]), "BF16"
            self._hide(parts)

    def _hide_scales(self, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        found = None if is_mxfp4(config) else read_quantization(config, self.directory / CONFIG)
        allowed = found or Quantization()
        in_int4 = find_int4(self.shapes, self.dtypes, files, allowed.int4)
        for weight, parts in in_int4.items():
            self.shapes[weight] = parts.shape
            self._hide(parts.stored)
        self._words = {weight: parts.codes for weight, parts in in_int4.items()}
        in_fp8 = find_scales(self.shapes, self.dtypes, files, allowed.fp8)
        self._hide(scales.name for scales in in_fp8.values())
        self._scales = in_fp8 | {weight: parts.scales for weight, parts in in_int4.items()}
        self.dtypes |= dict.fromkeys(self._scales, find_original_dtype(config))
        if found is not None:
            self._hide([name for name in self.shapes if is_inference_scale(name)])

    def _hide(self, names: Iterable[str]) -> None:
        for name in names:
            del self.shapes[name], self.dtypes[name]

    def read(
        self, name: str, *, dim: int | None = None, start: int = 0, size: int | None = None, entry: int | None = None
    ) -> torch.Tensor:
        """As `read_part`, one tensor or a part of it, of MXFP4 an entry or a part; fp32 of fp8 and int4."""
        if name in self._packed:
            assert entry is not None
            return self._read_packed(name, entry, dim, start, size)
        if name in self._scales and entry is None and len(self.shapes[name]) > 2:
            assert dim is None
            return torch.stack([self._read_blocks(name, None, 0, None, one) for one in range(self.shapes[name][0])])
        if name in self._scales:
            return self._read_blocks(name, dim, start, size, entry)
        return self._read_stored(name, dim, start, size, entry)

    def _read_blocks(self, name: str, dim: int | None, start: int, size: int | None, entry: int | None) -> torch.Tensor:
        """Of fp8 or int4: the part with the scales of all blocks that it has to do with."""
        stored, of_blocks = self._read_codes(name, dim, start, size, entry), self._scales[name]
        first, count, within = 0, None, [0, 0]
        scale_dim = dim if len(self._places[of_blocks.name].shape) > 1 else None
        if scale_dim is not None:
            block = of_blocks.block_size[scale_dim]
            first, count = find_blocks(start, stored.shape[scale_dim], block)
            within[scale_dim] = start - first * block
        scales = self._read_stored(of_blocks.name, scale_dim, first, count, entry)
        scales = scales if scales.dim() > 1 else scales.view(1, 1)
        return dequantize_blocks(stored, scales.to(self._device), of_blocks.block_size, (within[0], within[1]))

    def _read_codes(self, name: str, dim: int | None, start: int, size: int | None, entry: int | None) -> torch.Tensor:
        """Of fp8 or int4: what the scales multiply."""
        if name not in self._words:
            return self._read_stored(name, dim, start, size, entry).to(self._device)
        words = self._words[name]
        if dim != 1:
            return unpack_int4(self._read_stored(words, dim, start, size, entry).to(self._device))
        size = self.shapes[name][1] - start if size is None else size
        first, count = find_blocks(start, size, CODES_PER_WORD)
        codes = unpack_int4(self._read_stored(words, 1, first, count, entry).to(self._device))
        return codes.narrow(1, start - first * CODES_PER_WORD, size)

    def _read_packed(self, name: str, entry: int, dim: int | None, start: int, size: int | None) -> torch.Tensor:
        """[in, out] of one expert, whose codes are those of the transpose, with blocks along its rows."""
        if dim != 0:
            return self._dequantize(name, 0, start, size, entry).t()
        size = self.shapes[name][1] - start if size is None else size
        first, count = find_blocks(start, size, MXFP4_BLOCK)
        return self._dequantize(name, 1, first, count, entry).t().narrow(0, start - first * MXFP4_BLOCK, size)

    def _dequantize(self, name: str, dim: int, start: int, size: int | None, entry: int) -> torch.Tensor:
        parts = (self._read_stored(part, dim, start, size, entry) for part in self._packed[name])
        codes, scales = (part.to(self._device) for part in parts)
        return dequantize_mxfp4(codes.flatten(), scales, torch.bfloat16)

    def _read_stored(self, name: str, dim: int | None, start: int, size: int | None, entry: int | None) -> torch.Tensor:
        return read_part(self._places[name], dim=dim, start=start, size=size, entry=entry)


def find_weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files its index names. ValueError where there are none."""
    if not directory.is_dir():
        raise ValueError(f"model.checkpoint={directory} is not a directory")
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX).exists():
        raise ValueError(
            f"model.checkpoint={directory} holds neither {SINGLE_FILE} nor {INDEX};"
            " save the model as safetensors (save_pretrained does) or name another directory"
        )
    names = sorted(set(_read_weight_map(directory).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{directory / INDEX} names a file outside its directory: {outside[0]}")
    return [directory / name for name in names]


def list_stored_names(directory: Path) -> list[str]:
    """Of all tensors, from the index where there is one."""
    files = find_weight_files(directory)
    return list(read_header(files[0]) if files[0].name == SINGLE_FILE else _read_weight_map(directory))


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> file."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(type(name) is not str for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map; copy the checkpoint again")
    return weight_map
