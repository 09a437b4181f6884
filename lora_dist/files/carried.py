"""Tensors that nothing trains and no shard holds, from a model's checkpoint into what is written of it: indexers, and
what sees pictures.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_reader import HfReader
from lora_dist.files.hf_wrappers import BESIDE
from lora_dist.files.safetensors_stream import DTYPES
from lora_dist.lora.factors import derive_seed


class CarriedTensors:
    """Each read when its turn comes; drawn where the model has no checkpoint, from its name alone: a run that computes
    with it and the file that is written have the same.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of what is written. OSError where the checkpoint can no longer be read."""
        family = HF_FAMILIES[model.family]
        self.shapes, self._init_std, self._prefix = family.compute_carried(model), model.init_std, family.prefix
        is_read = self.shapes or model.wrapper is not None
        self._reader = _open(model.checkpoint) if is_read and model.checkpoint is not None else None
        self._wrapper = self._reader if model.wrapper is not None else None
        self.dtypes = dict.fromkeys(self.shapes, dtype)
        """As the others', but what may be wider and is stays so."""
        for name in self.shapes:
            if self._reader is not None and family.wider is not None and family.wider.fullmatch(name):
                self.dtypes[name] = torch.promote_types(dtype, DTYPES[self._reader.dtypes[name]])
        if self._wrapper is not None:
            self._add_beside(self._wrapper)

    def _add_beside(self, reader: HfReader) -> None:
        """Value for value: each in the dtype that it has, or had before it was quantised."""
        beside = [name for name in reader.shapes if name.startswith(BESIDE)]
        self.shapes = self.shapes | {name: reader.shapes[name] for name in beside}
        self.dtypes |= {name: DTYPES[reader.dtypes[name]] for name in beside}

    def find_stored_name(self, name: str) -> str:
        """Of any tensor of the model in what is written: as in the checkpoint where that is more than a text model."""
        return f"{self._prefix}{name}" if self._wrapper is None else self._wrapper.find_stored_name(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.shapes:
            yield name, self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._draw(name, self.shapes[name]) if self._reader is None else self._reader.read(name)

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As weights are drawn: norms at one, biases zero, the others Gaussian."""
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(name))) * self._init_std


def _open(directory: str) -> HfReader:
    try:
        return HfReader(Path(directory))
    except ValueError as error:
        raise OSError(f"{error}; it is read again for what goes from it into the written model") from None
