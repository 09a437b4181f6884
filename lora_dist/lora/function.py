"""y = x W^T + bias + x A^T B^T on one tensor-parallel shard, with no collective the frozen base has not.

Shapes: S sequence, B rows, H input features, O output features, R the summed ranks of the stacked adapters. The
factors are a_RH, b_OR where every row of the batch uses the same adapters, a_BRH, b_BOR where each row has its own.

| base linear | A            | B            | what stays TP-partial |
| column      | whole        | this shard's | dA                    |
| row         | this shard's | whole        | dB                    |

The partial gradients are summed over TP once a step (`lora_dist.gradients`). B comes scaled by alpha / lora_rank.
With sequence parallelism z = x A^T of the local shard rides in the base's all-gather as extra columns, and its
gradient in the base's reduce-scatter, so that the whole sequence is never kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lora_dist.lora.dropout import DropoutMask
from lora_dist.quant.weight import QuantizedWeight

BaseWeight = torch.Tensor | QuantizedWeight
"""[O, H], or what is dequantised to it for each product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCommunication:
    """What the base linear communicates, and so what LoRA may ride on."""

    allreduce_input_grad: bool
    """Column-parallel without sequence parallelism: d(input) is summed over TP in backward."""
    sequence_parallel: bool
    """Column-parallel with it: the input is gathered in forward, d(input) reduce-scattered in backward."""
    group: dist.ProcessGroup | None


NO_COMMUNICATION = ShardCommunication(allreduce_input_grad=False, sequence_parallel=False, group=None)


def lora_linear(
    x_SBH: torch.Tensor,
    weight_OH: BaseWeight,
    bias_O: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    mask: DropoutMask | None = None,
    communication: ShardCommunication = NO_COMMUNICATION,
) -> torch.Tensor:
    """The shard's output [S, B, O]; with sequence parallelism S is the local share on input, the whole on output."""
    y_SBO: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x_SBH, weight_OH, bias_O, a, b, mask, communication
    )
    return y_SBO


def frozen_linear(
    x_SBH: torch.Tensor,
    weight_OH: BaseWeight,
    bias_O: torch.Tensor | None,
    communication: ShardCommunication = NO_COMMUNICATION,
) -> torch.Tensor:
    """`lora_linear` without an adapter: the same communication, and no input kept."""
    nothing = x_SBH.new_zeros(0, x_SBH.shape[2]), x_SBH.new_zeros(weight_OH.shape[0], 0)
    return lora_linear(x_SBH, weight_OH, bias_O, *nothing, communication=communication)


class _LoraLinear(torch.autograd.Function):
    """Saves x once where A trains, z, and the weight by reference; computes no gradient of a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SBH: torch.Tensor,
        weight_OH: BaseWeight,
        bias_O: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        mask: DropoutMask | None,
        communication: ShardCommunication,
    ) -> torch.Tensor:
        z_SBR = _project(x_SBH if mask is None else mask.apply(x_SBH), a)
        gathered_SBH = x_SBH
        if communication.sequence_parallel:
            joined = _all_gather_sequence(torch.cat([x_SBH, z_SBR], dim=-1), communication.group)
            gathered_SBH, z_SBR = joined.split([x_SBH.shape[-1], z_SBR.shape[-1]], dim=-1)
            z_SBR = z_SBR.contiguous()  # a view would keep the gathered input alive
        y_SBO = F.linear(gathered_SBH, read_weight(weight_OH, x_SBH.dtype), bias_O)
        _add_projected(y_SBO, z_SBR, b)
        ctx.quantized, plain_OH = (weight_OH, None) if isinstance(weight_OH, QuantizedWeight) else (None, weight_OH)
        ctx.save_for_backward(x_SBH if ctx.needs_input_grad[3] else None, plain_OH, a, b, z_SBR)
        ctx.mask, ctx.communication = mask, communication
        return y_SBO

    @staticmethod
    def backward(ctx: Any, dy_SBO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_SBH, plain_OH, a, b, z_SBR = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        assert not needs_dweight, "the base weight of an adapted linear is frozen"
        dz_SBR = _project(dy_SBO, b.mT)
        dx_SBH = dy_SBO @ read_weight(ctx.quantized or plain_OH, dy_SBO.dtype) if needs_dx else None
        pending = None
        if ctx.communication.sequence_parallel:
            dx_SBH, dz_SBR, pending = _start_reduce_scatter(dx_SBH, dz_SBR, ctx.communication.group)
        elif dx_SBH is not None:
            _add_adapter_input_grad(dx_SBH, dz_SBR, a, ctx.mask)
            if ctx.communication.allreduce_input_grad:
                pending = dist.all_reduce(dx_SBH, group=ctx.communication.group, async_op=True)
        db = _multiply_outer(z_SBR, dy_SBO, b.ndim).mT  # while the collective runs
        dbias_O = dy_SBO.flatten(0, 1).sum(0) if needs_dbias else None
        if ctx.communication.sequence_parallel:
            assert pending is not None
            pending.wait()
            if dx_SBH is not None:
                dx_SBH = dx_SBH.contiguous()
                _add_adapter_input_grad(dx_SBH, dz_SBR, a, ctx.mask)
        da = None if x_SBH is None else _compute_a_grad(dz_SBR, x_SBH, a.ndim, ctx.mask)
        if pending is not None and not ctx.communication.sequence_parallel:
            pending.wait()
        return dx_SBH, None, dbias_O, da, db, None, None


def read_weight(weight_OH: BaseWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight, or a temporary copy of a quantised one: kept no longer than the product takes."""
    return weight_OH.dequantize(dtype) if isinstance(weight_OH, QuantizedWeight) else weight_OH


def _project(x_SBH: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x A^T [S, B, R]: one product for all rows, or one batched product where each row has its own A [B, R, H].

    Computed as A x^T, and d(B) as z^T dy: with its few rows as rows such a product takes a CPU a half to a tenth of
    what it takes with them as columns.
    """
    if a.ndim == 2:
        z_RT = a @ x_SBH.flatten(0, 1).t()
        return z_RT.t().view(*x_SBH.shape[:2], a.shape[0])
    return torch.bmm(x_SBH.transpose(0, 1), a.mT).transpose(0, 1)


def _expand(z_SBR: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """z B^T [S, B, O]."""
    if b.ndim == 2:
        return z_SBR @ b.t()
    return torch.bmm(z_SBR.transpose(0, 1), b.mT).transpose(0, 1)


def _add_projected(y_SBO: torch.Tensor, z_SBR: torch.Tensor, b: torch.Tensor) -> None:
    """y += z B^T, in place."""
    if b.ndim == 2:
        y_SBO.view(-1, y_SBO.shape[-1]).addmm_(z_SBR.flatten(0, 1), b.t())
    else:
        y_SBO.transpose(0, 1).baddbmm_(z_SBR.transpose(0, 1), b.mT)


def _multiply_outer(z_SBR: torch.Tensor, x_SBH: torch.Tensor, ndim: int) -> torch.Tensor:
    """Gradient of a factor: summed over all tokens [R, H], or over each row's [B, R, H]."""
    if ndim == 2:
        return z_SBR.flatten(0, 1).t() @ x_SBH.flatten(0, 1)
    return torch.bmm(z_SBR.permute(1, 2, 0), x_SBH.transpose(0, 1))


def _compute_a_grad(dz_SBR: torch.Tensor, x_SBH: torch.Tensor, ndim: int, mask: DropoutMask | None) -> torch.Tensor:
    return _multiply_outer(dz_SBR, x_SBH if mask is None else mask.apply(x_SBH), ndim)


def _add_adapter_input_grad(
    dx_SBH: torch.Tensor, dz_SBR: torch.Tensor, a: torch.Tensor, mask: DropoutMask | None
) -> None:
    """dx += dz A, through the dropout's mask."""
    if mask is None:
        _add_projected(dx_SBH, dz_SBR, a.mT)
    else:
        dx_SBH += mask.apply(_expand(dz_SBR, a.mT))


def _all_gather_sequence(x_SBH: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    gathered = x_SBH.new_empty((x_SBH.shape[0] * dist.get_world_size(group), *x_SBH.shape[1:]))
    dist.all_gather_into_tensor(gathered, x_SBH, group=group)
    return gathered


def _start_reduce_scatter(
    dx_SBH: torch.Tensor | None, dz_SBR: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor | None, torch.Tensor, dist.Work]:
    """[dx | dz] summed over TP, this rank's sequence share of it: views that are filled once the work is waited for."""
    joined = dz_SBR if dx_SBH is None else torch.cat([dx_SBH, dz_SBR], dim=-1)
    scattered = joined.new_empty((joined.shape[0] // dist.get_world_size(group), *joined.shape[1:]))
    work = dist.reduce_scatter_tensor(scattered, joined.contiguous(), group=group, async_op=True)
    if dx_SBH is None:
        return None, scattered, work
    dx_local, dz_local = scattered.split([dx_SBH.shape[-1], dz_SBR.shape[-1]], dim=-1)
    return dx_local, dz_local, work
