"""A layer's attention core by itself, what goes into it, and what it keeps."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks

from lora_dist.mcore.attention import Mask, SdpaAttention, SinkAttention

A, D = 4, 8
"""Heads, and their features where a test says nothing else."""


def build_core(
    kind: type[SdpaAttention] = SdpaAttention, dtype: torch.dtype = torch.float64, *, dropout: float = 0.0
) -> SdpaAttention:
    """Where sinks are put torch.cuda.current_device says."""
    core = kind(
        TransformerConfig(
            num_layers=1, hidden_size=A * D, num_attention_heads=A, attention_dropout=dropout, params_dtype=dtype
        )
    )
    if isinstance(core, SinkAttention):
        torch.nn.init.normal_(core.sinks, generator=torch.Generator().manual_seed(1))
    return core


def draw(
    sizes: tuple[int, int], num_kv_heads: int, dtype: torch.dtype = torch.float64, features: Sequence[int] = (D, D)
) -> list[torch.Tensor]:
    """Queries, keys and values of (positions, rows), with the features of a key and of a value."""
    generator = torch.Generator().manual_seed(0)
    heads = zip((A, num_kv_heads, num_kv_heads), (features[0], *features), strict=True)
    return [torch.randn(*sizes, *one, generator=generator, dtype=dtype).requires_grad_() for one in heads]


def run(core: SdpaAttention, mask: Mask, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The core's output and the gradients, of inputs and sinks, of a sum that weighs every feature differently."""
    output = core(*inputs, mask)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), [*inputs, *core.parameters()])]


def count_saved_bytes(core: SdpaAttention, mask: Mask, inputs: list[torch.Tensor]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        core(*inputs, mask)
    return sum(kept.values())
