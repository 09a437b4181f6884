"""What trains, as the optimizer, the checkpoints and the report see it: local tensors and how they make the whole."""

from dataclasses import dataclass, field

import torch
from torch import nn

from lora_dist.quant.weight import QuantizedWeight


@dataclass(kw_only=True, slots=True, eq=False)
class TrainableParameter:
    """One trainable parameter of this process and its place in the whole, topology-free tensor.

    The whole tensor is the concatenation of the TP shards along `shard_dim` (cut to `full_shape`, which leaves out
    the rows that pad a vocabulary), block by block, or any one of them where `shard_dim` is None. `tp_ranges` says
    otherwise.
    """

    name: str
    """Canonical, with the layer's global index: `layers.3.q_proj.lora_A`; the same on every topology."""
    parameter: nn.Parameter
    """This process's shard; without memory, only its shape and dtype, where `quantized` holds the values."""
    full_shape: tuple[int, ...]
    shard_dim: int | None
    """Tensor dimension split over TP; None where every TP rank holds the whole."""
    tp_partial_grad: bool
    """True where each TP rank computes one summand of the gradient: summed over TP once a step."""
    kind: str
    """lora_A, lora_B, magnitude, bias, bottleneck, prefix or base: its parameter group, and what the report counts it
    under."""
    tp_ranges: tuple[tuple[tuple[int, int], ...], ...] | None = None
    """Where TP ranks share rows, as those of one key-value head do: start and length of each rank's parts along
    `shard_dim`, by tp_rank. Each rank computes one summand of a shared row's gradient."""
    num_blocks: int = 1
    """Parts of equal length along `shard_dim` that are split over TP one by one: [gate | up] of a gated MLP has two."""
    tied: bool = False
    """True for the first and last stage's copies of the tied embedding, whose gradients are summed once a step."""
    owned: bool = True
    """False for the last stage's copy of the tied embedding: left out of the norm, of counts and of files."""
    quantized: QuantizedWeight | None = None
    """A frozen linear's weight under another model.base_format than native; it never trains."""
    kept_dtype: torch.dtype | None = None
    """Of its values in files, where that is not the others'."""
    stack: "tuple[TrainableParameter, int] | None" = None
    """Of one expert's weight, unless it is quantised: the parameter that holds all experts', and its number."""
    local_shape: tuple[int, ...] = field(init=False)
    """Of this process's shard, padding included; `parameter` itself is empty where ZeRO-3 partitions it."""

    def __post_init__(self) -> None:
        self.local_shape = find_shape(self.parameter)


def find_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the parameter as its module means it, also while ZeRO-3 has partitioned it and left it empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def find_source(one: TrainableParameter) -> str:
    """The name under which its whole value is kept: a copy of the tied embedding has its owner's."""
    return one.name if one.owned or not one.tied else "embedding.word_embeddings.weight"
