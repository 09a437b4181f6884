"""Tensors with which nothing is computed here, from a model's checkpoint into what is written of it: indexers."""

from collections.abc import Iterator
from pathlib import Path

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_reader import HfReader
from lora_dist.files.safetensors_stream import DTYPE_NAMES
from lora_dist.lora.factors import derive_seed


class CarriedTensors:
    """Each read when its turn comes; drawn where the model has no checkpoint, from its name alone, since no run's
    result depends on it.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of what is written. OSError where the checkpoint can no longer be read."""
        family = HF_FAMILIES[model.family]
        self.shapes, self._init_std = family.compute_carried(model), model.init_std
        self._reader = _open(model.checkpoint) if self.shapes and model.checkpoint is not None else None
        self.dtypes = dict.fromkeys(self.shapes, dtype)
        """As the others', but what may be wider and is stays so."""
        for name in self.shapes:
            if self._reader is not None and family.wider is not None and family.wider.fullmatch(name):
                self.dtypes[name] = torch.promote_types(dtype, _BY_NAME[self._reader.dtypes[name]])

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in self.shapes.items():
            yield name, self._draw(name, shape) if self._reader is None else self._reader.read(name)

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As weights are drawn: norms at one, biases zero, the others Gaussian."""
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(name))) * self._init_std


_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _open(directory: str) -> HfReader:
    try:
        return HfReader(Path(directory))
    except ValueError as error:
        raise OSError(f"{error}; it is read again for what goes from it into the written model") from None
