"""The modules of one transformer layer that differ from Megatron's own: LoRA linears, recompute."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from lora_dist.base_format import find_linear_format
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.function import NO_COMMUNICATION, BaseWeight, ShardCommunication, frozen_linear
from lora_dist.lora.layer import LoraShard
from lora_dist.lora.mixed import MixedLoraShard
from lora_dist.mcore.norm import build_output_norm
from lora_dist.quant.weight import build_quantized_weight


def allocate(*sizes: int, config: TransformerConfig) -> torch.Tensor:
    """Where Megatron puts its own linears' weights."""
    return torch.empty(*sizes, dtype=config.params_dtype, device=torch.cuda.current_device())


def _replace_weight(linear: "LoraColumnParallelLinear | LoraRowParallelLinear | LoraLocalLinear") -> None:
    """A quantised weight in place of the one just allocated, where the model's base_format says so."""
    base_format = find_linear_format(linear.config.model.base_format, of_experts=False)
    if base_format != "native":
        quantized = build_quantized_weight(base_format, linear.weight, column_parallel=linear.column_parallel)
        del linear.weight
        linear.weight = quantized


class LoraColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, whose shard product takes in its adapters where it has some."""

    column_parallel = True

    def __init__(self, *args: Any, **options: Any) -> None:
        # The bias goes into the GEMM here; Megatron would add it in a pass of its own.
        super().__init__(*args, **{**options, "skip_bias_add": False})
        _replace_weight(self)
        self.lora: LoraShard | MixedLoraShard | None = None

    def _forward_impl(self, input: torch.Tensor, weight: BaseWeight, **options: Any) -> torch.Tensor:
        communicates = options["allreduce_dgrad"] or options["sequence_parallel"]
        if self.lora is None and isinstance(weight, torch.Tensor):
            if not communicates:
                return F.linear(input, weight, options["bias"])
            return self._compute_base(input, weight, options.pop("bias"), options)
        communication = ShardCommunication(
            allreduce_input_grad=options["allreduce_dgrad"],
            sequence_parallel=options["sequence_parallel"],
            group=options["tp_group"],
        )
        return (self.lora or frozen_linear)(input, weight, options["bias"], communication)

    def _compute_base(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        if bias is None or weight.requires_grad or not bias.requires_grad:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        # Over a frozen weight Megatron's product gives its bias no gradient.
        return super()._forward_impl(input=input, weight=weight, bias=None, **options) + bias


class LoraRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel linear; its adapters' partial product joins the base's before the one reduction.

    Alone (tp_size 1) it takes its bias into the product, where Megatron leaves it to the residual's addition.
    """

    column_parallel = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _replace_weight(self)
        self.lora: LoraShard | MixedLoraShard | None = None

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and the bias that is still to be added."""
        output, bias = super().forward(input_)
        return output, None if self._adds_bias else bias

    @property
    def _adds_bias(self) -> bool:
        return self.tp_group.size() == 1

    def _forward_impl(self, input: torch.Tensor, weight: BaseWeight, **options: Any) -> torch.Tensor:
        bias = self.bias if self._adds_bias else None
        if self.lora is None and isinstance(weight, torch.Tensor):
            return F.linear(input, weight, bias)
        return (self.lora or frozen_linear)(input, weight, bias, NO_COMMUNICATION)


class LoraLocalLinear(nn.Module):
    """A shard of a linear without bias whose input and output others bring from and to the ranks."""

    def __init__(
        self, config: TransformerConfig, out_features: int, in_features: int, *, column_parallel: bool
    ) -> None:
        super().__init__()
        self.config, self.column_parallel = config, column_parallel
        self.weight = nn.Parameter(allocate(out_features, in_features, config=config))
        _replace_weight(self)
        self.lora: LoraShard | MixedLoraShard | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.lora is None and isinstance(self.weight, torch.Tensor):
            return F.linear(input, self.weight)
        return (self.lora or frozen_linear)(input, self.weight, None, NO_COMMUNICATION)


class LoraWholeLinear(LoraLocalLinear):
    """One that every TP rank holds whole, acting on what the rank has of the sequence."""

    def __init__(self, config: TransformerConfig, out_features: int, in_features: int) -> None:
        super().__init__(config, out_features, in_features, column_parallel=True)


def bring_to_ranks(local_SBH: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """The whole sequence on every TP rank; backward sums what the ranks make of its gradient."""
    group = ps.get_tensor_model_parallel_group()
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(local_SBH, group=group)
    return copy_to_tensor_model_parallel_region(local_SBH, group=group)


LoraLinear = LoraColumnParallelLinear | LoraRowParallelLinear | LoraLocalLinear


class Layer(TransformerLayer):
    """Megatron's transformer layer with recomputation that works over a frozen base.

    A recomputed region needs an input that requires grad, which a frozen embedding's output does not: the region's
    input is detached and made to. What the adapters know of the microbatch is put back when backward runs the region
    again, since by then a pipeline has moved on to another microbatch.
    """

    recompute: str = "none"
    clock: DropoutClock | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        if not self._recomputes("full", hidden_states):
            return super().forward(hidden_states, *args, **options)

        def whole_layer(hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = super(Layer, self).forward(hidden, *args, **options)[0]
            return output

        return self._checkpoint(whole_layer, hidden_states), None

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """What attention has left, and the MLP on it added."""
        return self._recompute_mlp(
            lambda hidden: super(Layer, self)._forward_mlp(hidden, *args, **options), hidden_states
        )

    def _recompute_mlp(self, mlp: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return self._checkpoint(mlp, *inputs) if self._recomputes("selective", inputs[0]) else mlp(*inputs)

    def _recomputes(self, kind: str, hidden_states: torch.Tensor) -> bool:
        if self.recompute != kind or not (self.training and torch.is_grad_enabled()):
            return False
        return hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())

    def _checkpoint(self, region: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        assert self.clock is not None
        clock, generators = self.clock, get_cuda_rng_tracker()
        mine = clock.row_keys_B, clock.adapter_of_row, generators._current_state_name

        def keyed_region(*inputs: torch.Tensor) -> torch.Tensor:
            outer = clock.row_keys_B, clock.adapter_of_row, generators._current_state_name
            # Megatron's checkpoint puts the numbers back, but not the name of the generator whose they are.
            clock.row_keys_B, clock.adapter_of_row, generators._current_state_name = mine
            try:
                return region(*inputs)
            finally:
                clock.row_keys_B, clock.adapter_of_row, generators._current_state_name = outer

        if not inputs[0].requires_grad:
            inputs = inputs[0].detach().requires_grad_(), *inputs[1:]
        return tensor_parallel.checkpoint(keyed_region, False, *inputs)


class NormedLayer(Layer):
    """With a norm on what the MLP gives; attention has its own (`rotary.RotarySelfAttention`)."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.mlp.output_layernorm = build_output_norm(config)

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        output, bias = mlp_output_with_bias
        assert bias is None, "nothing but the norm's output is added to the residual stream"
        hidden: torch.Tensor = super()._forward_post_mlp((self.mlp.output_layernorm(output), None), residual)
        return hidden


class ScaledAddition:
    """In place of Megatron's bias-dropout-add: what a sublayer gives, multiplied, joins the residual stream in one pass
    over both, for which nothing is kept.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """What Megatron calls with (output, bias), the residual and the dropout's probability."""

        def add(
            output_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, probability: float
        ) -> torch.Tensor:
            output, bias = output_with_bias
            assert bias is None, "no family with multipliers has biases"
            return torch.add(residual, F.dropout(output, probability, training), alpha=self._scale)

        return add


class ParallelLayer(Layer):
    """x + attention(norm(x)) + mlp(its own norm(x)), as GPT-NeoX adds them (arXiv:2204.06745, section 2.1)."""

    _entered: torch.Tensor | None = None
    """x, from attention's half to the MLP's."""

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        self._entered = hidden_states
        return super()._forward_attention(hidden_states, *args, **options)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        entered, self._entered = self._entered, None
        assert entered is not None

        def mlp(hidden: torch.Tensor, entered: torch.Tensor) -> torch.Tensor:
            self._entered = entered
            try:
                output: torch.Tensor = TransformerLayer._forward_mlp(self, hidden, *args, **options)
            finally:
                self._entered = None
            return output

        return self._recompute_mlp(mlp, hidden_states, entered)

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super()._forward_pre_mlp_layernorm(self._entered)
