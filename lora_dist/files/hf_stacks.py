"""Whether the files of a checkpoint hold a layer's experts in one tensor, and which way round."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_dist.architecture import IN_OUT, OUT_IN
from lora_dist.files.hf_layout import STACKS
from lora_dist.files.hf_reader import CONFIG, INDEX, SINGLE_FILE, HfReader, list_stored_names
from lora_dist.files.hf_wrappers import find_layout, to_text_name

_OF_EXPERTS = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+\.)?.+")
_TRANSPOSED = "qwen3_vl_moe"
"""Whose published files have stacks [experts, in, out], while transformers 5 has them [experts, out, in] in memory and
turns, tensor by tensor, what does not have that shape."""


def find_stacked_experts(directory: Path, fields: Mapping[str, Any], wrapper: str | None) -> str | None:
    """ModelConfig's stacked_experts by the names in the files; None where there are no files. ValueError for a mixture.

    `fields` are ModelConfig's other ones.
    """
    path = next((path for name in (SINGLE_FILE, INDEX) if (path := directory / name).is_file()), None)
    if path is None or fields.get("num_experts") is None:
        return None
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    stacked = _find_stack(directory, fields["num_layers"], wrapper, stamp)
    if stacked is None or wrapper != _TRANSPOSED:
        return None if stacked is None else OUT_IN
    return _find_order(directory, fields, int(stacked))


@lru_cache(maxsize=8)  # of a hundred thousand names, asked for once a field of the model
def _find_stack(directory: Path, num_layers: int, wrapper: str | None, stamp: tuple[int, int]) -> str | None:
    """A layer whose experts are stacked. `stamp` is there to read files again that have changed."""
    names = list_stored_names(directory)
    layout = None if wrapper is None else find_layout(names, directory)
    own, layer = dict[bool, str](), None
    for name in names:
        found = _OF_EXPERTS.fullmatch((name if layout is None else to_text_name(name, layout)) or "")
        if found is not None and int(found[1]) < num_layers:
            own.setdefault(found[2] is None, name)
            layer = found[1] if found[2] is None else layer
    if len(own) == 2:
        raise ValueError(
            f"{directory} holds {own[True]}, of all experts of a layer, and {own[False]}, of one; write the checkpoint"
            " with one of the two in all layers"
        )
    return layer


def _find_order(directory: Path, fields: Mapping[str, Any], layer: int) -> str:
    num_inside, hidden_size = fields["ffn_hidden_size"], fields["hidden_size"]
    if hidden_size in (num_inside, 2 * num_inside):
        raise ValueError(
            f"{directory / CONFIG}: with hidden_size={hidden_size} and moe_intermediate_size={num_inside} a stack of"
            f" experts is square, and of a {_TRANSPOSED} nothing says which way round; write one tensor an expert"
        )
    name = f"model.layers.{layer}.{STACKS['linear_fc1.weight']}"
    shape = HfReader(directory).shapes.get(name)
    for order, matrix in ((OUT_IN, (2 * num_inside, hidden_size)), (IN_OUT, (hidden_size, 2 * num_inside))):
        if shape == (fields["num_experts"], *matrix):
            return order
    raise ValueError(f"{directory}: {name} has shape {shape}, which config.json gives it neither way round")
