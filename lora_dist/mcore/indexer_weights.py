"""Indexers onto the device, where rows are long enough for them to matter: built and filled."""

import torch

from lora_dist.files.carried import CarriedTensors
from lora_dist.files.hf_deepseek_v32 import name_indexer_tensor
from lora_dist.long_rows import check_long_rows
from lora_dist.mcore.indexer import Indexer
from lora_dist.mcore.model import ShardedGpt


def open_indexers(gpt: ShardedGpt, num_positions: int, *, fill: bool = True) -> None:
    """Have the indexers of this stage's layers, where rows of `num_positions` need them and they are not there yet.

    Each process reads its stage's from the checkpoint, or draws what would be written. ValueError, on every process,
    where they cannot be had: `check_long_rows`. OSError where the checkpoint can no longer be read.
    """
    check_long_rows(gpt.model, num_positions=num_positions, pp_size=gpt.topology.pp_size)
    if gpt.indexes or not gpt.model.selects(num_positions):
        return
    gpt.indexes = True
    tensors = CarriedTensors(gpt.model, gpt.config.params_dtype) if fill else None
    indexer_layer = gpt.first_layer
    for number, layer in enumerate(gpt.decoder.layers, gpt.first_layer):
        attention = layer.self_attention
        if gpt.model.has_indexer(number):
            indexer_layer = number
            attention.indexer = Indexer(gpt.config, gpt.topology.device)
            if tensors is not None:
                _fill(attention.indexer, number, tensors)
        attention.indexer_layer = indexer_layer
        attention.lends_selection = number + 1 in gpt.model.layers_without_indexer


@torch.no_grad()
def _fill(indexer: Indexer, layer: int, tensors: CarriedTensors) -> None:
    for name, value in indexer.named_buffers():
        value.copy_(tensors.read(name_indexer_tensor(layer, name)))
