"""Trained vectors written over a shard's activations at the slots, whole on every tensor-parallel process.

Under sequence parallelism what enters a layer is of this rank's positions alone, and its gradients are summed once a
step, as the norms' are. So are word embeddings where rotary positions let Megatron split them at once; where learned
positions are added to the whole sequence, their gradient is gathered once a microbatch, and is the same on every TP
rank. Nothing else is communicated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter
from lora_dist.prefix.layer import PrefixVectors
from lora_dist.prefix.spec import PrefixSpec


def put_prefixes(
    gpt: ShardedGpt, specs: Sequence[PrefixSpec], *, init_std: float, seed: int
) -> list[TrainableParameter]:
    """Put this stage's vectors into a model that is frozen already, and list them; `gpt.slots_BS` says where they go.

    Nothing is written where that is None.
    """
    trainable = []
    for spec in specs:
        module = _find_module(gpt, spec)
        if module is not None:
            vectors = PrefixVectors(spec, init_std=init_std, seed=seed, device=gpt.topology.device)
            module.add_module("prefix_vectors", vectors)
            trainable.append(_describe(gpt, vectors))
            if spec.layer is None:
                _write_output(gpt, module, vectors)
            else:
                _write_input(gpt, module, vectors)
    return trainable


def _find_module(gpt: ShardedGpt, spec: PrefixSpec) -> nn.Module | None:
    """The word embedding or the layer; None where another stage holds it."""
    if spec.layer is None:
        return gpt.embedding.word_embeddings if gpt.pre_process else None
    return gpt.decoder.layers[spec.layer - gpt.first_layer] if spec.layer in gpt.stage_layers else None


def _write_output(gpt: ShardedGpt, embedding: nn.Module, vectors: PrefixVectors) -> None:
    is_split = _splits_embedding(gpt)

    def write(_module: nn.Module, _inputs: object, hidden_XYH: torch.Tensor) -> torch.Tensor:
        """Rows first; the sequence first where it is split."""
        if gpt.slots_BS is None:
            return hidden_XYH
        return vectors(hidden_XYH, _cut_sequence(gpt, gpt.slots_BS.t()) if is_split else gpt.slots_BS)

    embedding.register_forward_hook(write)


def _splits_embedding(gpt: ShardedGpt) -> bool:
    """Whether the word embedding's output is this rank's positions alone."""
    return gpt.topology.sequence_parallel and gpt.model.architecture.rotary


def _write_input(gpt: ShardedGpt, layer: nn.Module, vectors: PrefixVectors) -> None:
    """Outside what the layer may recompute, since by then a pipeline has moved on to another microbatch's slots."""

    def write(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if gpt.slots_BS is None:
            return None
        slots_SB = _cut_sequence(gpt, gpt.slots_BS.t())
        return inputs, {**options, "hidden_states": vectors(options["hidden_states"], slots_SB)}

    layer.register_forward_pre_hook(write, with_kwargs=True)


def _cut_sequence(gpt: ShardedGpt, slots_SB: torch.Tensor) -> torch.Tensor:
    """The positions of this rank's activations, laid out as those are: what is chosen by them goes to other stages."""
    topology = gpt.topology
    mine = slots_SB.chunk(topology.tp_size)[topology.tp_rank] if topology.sequence_parallel else slots_SB
    return mine.contiguous()


def _describe(gpt: ShardedGpt, vectors: PrefixVectors) -> TrainableParameter:
    return TrainableParameter(
        name=vectors.spec.name,
        parameter=vectors.vectors_NH,
        full_shape=vectors.spec.shape,
        shard_dim=None,
        tp_partial_grad=_splits_embedding(gpt) if vectors.spec.layer is None else gpt.topology.sequence_parallel,
        kind="prefix",
    )
