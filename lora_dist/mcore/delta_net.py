"""A gated DeltaNet in the place of attention (arXiv:2412.06464), its key heads with their value heads TP-sharded.

One column-parallel linear makes queries, keys, values and gates, a row-parallel one takes what the heads give, so that
the layer communicates what one with attention does. In between each TP rank has its heads alone, and keeps nothing for
backward but what the first linear gave: backward computes the heads again.

Shapes: S sequence, B rows, H hidden, M features out of the first linear on this rank, as those of every other here key
head by key head; O features of all value heads of this rank. The others are those of `delta_rule`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.batch import RowBlocks
from lora_dist.delta_sizes import DeltaSizes
from lora_dist.generation.cache import StateCache
from lora_dist.mcore.attention import LayerMasks, Mask
from lora_dist.mcore.delta_rule import (
    apply_delta_rule,
    convolve,
    count_active,
    cut_into_chunks,
    join_chunks,
    normalise,
)
from lora_dist.mcore.layers import LoraColumnParallelLinear, LoraRowParallelLinear, allocate
from lora_dist.mcore.row_group import RowGroup

_Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GatedDeltaNet(nn.Module):
    """In place of Megatron's self-attention, with its constructor: `config.model` says what there is to build."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        sizes: DeltaSizes = config.model.delta_sizes
        num_projected = sizes.key_heads * sum(sizes.projected_per_key.values())
        options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
        options["tp_group"] = ps.get_tensor_model_parallel_group()
        self.linear_in = LoraColumnParallelLinear(config.hidden_size, num_projected, gather_output=False, **options)
        self.core_attention = DeltaHeads(config)
        self.linear_out = LoraRowParallelLinear(sizes.value_dim, config.hidden_size, input_is_parallel=True, **options)

    def forward(
        self, hidden_SBH: torch.Tensor, attention_mask: Mask | LayerMasks, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """The output, under sequence parallelism this rank's share as the input is, and no bias."""
        mixed_SBM, _ = self.linear_in(hidden_SBH)
        return self.linear_out(self.core_attention(mixed_SBM, attention_mask))[0], None


class DeltaHeads(nn.Module):
    """This rank's heads: convolution, delta rule, norm and gate. Computed in fp32 at least."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sizes: DeltaSizes = config.model.delta_sizes.cut(config.tensor_model_parallel_size)
        num_convolved = self.sizes.key_heads * self.sizes.convolved_per_key
        self.epsilon = config.layernorm_epsilon
        self.kernels = nn.Parameter(allocate(num_convolved, self.sizes.kernel_size, config=config))
        self.decay_logs = nn.Parameter(allocate(self.sizes.value_heads, config=config))
        """Of what multiplies each step of a value head."""
        self.step_offsets = nn.Parameter(allocate(self.sizes.value_heads, config=config))
        self.norm_factors = nn.Parameter(allocate(self.sizes.value_size, config=config))
        self.sees_window = False
        self.row_group: RowGroup | None = None
        """Where rows are split over processes: those. Each then has whole rows of a share of the heads."""
        self.cache: StateCache | None = None
        """Where the model runs step by step: what is left of each row."""

    def forward(self, mixed_SBM: torch.Tensor, attention_mask: Mask | LayerMasks) -> torch.Tensor:
        """[S, B, O]."""
        mask = attention_mask.recurrent if isinstance(attention_mask, LayerMasks) else attention_mask
        parameters = self.kernels, self.decay_logs, self.step_offsets, self.norm_factors
        if self.row_group is not None:
            assert not isinstance(mask, torch.Tensor), "the configuration refuses it"
            return self._run_heads(mixed_SBM, mask, self.row_group, parameters)
        if self.cache is not None:
            assert isinstance(mask, torch.Tensor)
            return self._run_step(mixed_SBM, mask, self.cache, parameters)
        assert not isinstance(mask, torch.Tensor), "blocks say where examples begin, and a mask does not"
        return self._run_again(mixed_SBM, mask, parameters)

    def _run_heads(
        self, mixed_PBM: torch.Tensor, row_blocks: RowBlocks | None, row_group: RowGroup, parameters: _Parameters
    ) -> torch.Tensor:
        """[P, B, O] of this process's positions: heads of whole rows, for which two exchanges bring the positions."""
        mixed_SBM = row_group.exchange_for_heads(mixed_PBM.unflatten(-1, (self.sizes.key_heads, -1))).flatten(2)
        *of_heads, norm_factors = parameters
        mine = (*map(row_group.take_heads, of_heads), norm_factors)
        output_SBO = self._run_again(mixed_SBM, row_blocks, mine)
        return row_group.exchange_for_positions(output_SBO[:, :, None]).flatten(2)

    def _run_again(
        self, mixed_SBM: torch.Tensor, row_blocks: RowBlocks | None, parameters: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        output_SBO: torch.Tensor = _RunAgain.apply(partial(self._run, row_blocks=row_blocks), mixed_SBM, *parameters)  # type: ignore[no-untyped-call]
        return output_SBO

    def _run(self, mixed_SBM: torch.Tensor, *parameters: torch.Tensor, row_blocks: RowBlocks | None) -> torch.Tensor:
        num_positions, num_rows, _ = mixed_SBM.shape
        chunks = cut_into_chunks(mixed_SBM, row_blocks)
        active = count_active(num_rows, num_positions, row_blocks)
        output, _ = self._run_chunks(chunks, parameters, active)
        return join_chunks(output, num_rows, num_positions, row_blocks)

    def _run_step(
        self, mixed_SBM: torch.Tensor, is_text_BS: torch.Tensor, cache: StateCache, parameters: _Parameters
    ) -> torch.Tensor:
        """After what the cache has of each row, and into it; what is padding before a row leaves no trace there."""
        num_positions, num_rows, _ = mixed_SBM.shape
        mixed_SBM = mixed_SBM * is_text_BS.t()[..., None]
        chunks, filled = cut_into_chunks(mixed_SBM, None), cut_into_chunks(is_text_BS.t()[..., None], None)
        active = count_active(num_rows, num_positions, None)
        output, state = self._run_chunks(chunks, parameters, active, filled=filled, cache=cache)
        assert state is not None
        convolved = self._split(mixed_SBM)[0].flatten(2)
        cache.keep(convolved.transpose(0, 1), state, num_before=self.sizes.kernel_size - 1)
        return join_chunks(output, num_rows, num_positions, None)

    def _split(self, mixed: torch.Tensor) -> list[torch.Tensor]:
        """What is convolved [..., G, 2 K + R V], the output's gate [..., G, R V] and the two others [..., G, R]."""
        sizes = self.sizes
        parts = [sizes.convolved_per_key, sizes.values_per_key * sizes.value_size, *[sizes.values_per_key] * 2]
        return list(mixed.unflatten(-1, (-1, sum(sizes.projected_per_key.values()))).split(parts, dim=-1))

    def _run_chunks(
        self,
        chunks_NCM: torch.Tensor,
        parameters: tuple[torch.Tensor, ...],
        active: list[int],
        *,
        filled: torch.Tensor | None = None,
        cache: StateCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, C, O] in the dtype of the input, and with a cache the last state. `filled` [N, C, 1]: False where nothing
        is written or forgotten.
        """
        sizes, dtype = self.sizes, torch.promote_types(chunks_NCM.dtype, torch.float32)
        kernels, decay_logs, step_offsets, norm_factors = (one.to(dtype) for one in parameters)
        convolved, output_gate, strength, step = (part.to(dtype) for part in self._split(chunks_NCM))
        tails = None if cache is None or cache.tails is None else cache.tails.to(dtype)
        convolved = F.silu(convolve(convolved.flatten(2), kernels, active, tails)).unflatten(
            -1, (-1, sizes.convolved_per_key)
        )
        query, key, value = convolved.split(list(sizes.convolved_parts.values()), dim=-1)
        log_decay = -decay_logs.exp() * F.softplus(step.flatten(2) + step_offsets)
        strength, log_decay = strength.sigmoid(), log_decay.unflatten(-1, (-1, sizes.values_per_key))
        if filled is not None:
            strength, log_decay = strength * filled[..., None], log_decay * filled[..., None]
        read_NGRCV, state = apply_delta_rule(
            normalise(query.transpose(1, 2).contiguous()),  # or each of many products would copy it
            normalise(key.transpose(1, 2).contiguous()),
            value.unflatten(-1, (sizes.values_per_key, -1)).permute(0, 2, 3, 1, 4).contiguous(),
            log_decay.permute(0, 2, 3, 1),
            strength.permute(0, 2, 3, 1),
            active,
            state_PGRKV=None if cache is None else cache.state,
            keeps_state=cache is not None,
        )
        rstd = (read_NGRCV.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        normed = (read_NGRCV * rstd * norm_factors).permute(0, 3, 1, 2, 4).flatten(2)
        return (normed * F.silu(output_gate.flatten(2))).to(chunks_NCM.dtype), state


class _RunAgain(torch.autograd.Function):
    """`function` of tensors, of which nothing else is kept: backward runs it again, and differentiates that."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        inputs = [one.detach().requires_grad_(need) for one, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [one for one in inputs if one.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, doutput))
        return None, *(next(gradients) if need else None for need in needed)
