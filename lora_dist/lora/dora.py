"""DoRA (arXiv:2402.09353): each output row of W0 + s B A has a length of its own, `magnitude`, which trains.

    W' = gain (W0 + s B A),  gain = magnitude / |W0 + s B A|,  the norm of each whole row

The norm takes part in no gradient (section 4.3). Where the input features are split over TP a row is too, and the
squares of its parts are summed over TP: [O] numbers a forward pass, the only communication that DoRA adds.

Shapes: S sequence, B rows, H input features, O output features, R the summed ranks of the stacked adapters.
"""

import torch
import torch.distributed as dist

from lora_dist.lora.dropout import DropoutMask
from lora_dist.lora.function import BaseWeight, ShardCommunication, lora_linear


def dora_linear(
    x_SBH: torch.Tensor,
    weight_OH: BaseWeight,
    bias_O: torch.Tensor | None,
    a_RH: torch.Tensor,
    b_OR: torch.Tensor,
    gain_O: torch.Tensor,
    *,
    mask: DropoutMask | None,
    communication: ShardCommunication,
) -> torch.Tensor:
    """As `lora_linear`, its rows scaled by `gain_O`; B comes scaled by alpha / lora_rank.

    With dropout, as HF PEFT has it, the base's own output sees the whole input and all that the adapter changes, the
    base's scaled part too, the dropped one: W0 (x - d) + gain (W0 + s B A) d for a dropped input d. That is a second
    base product.
    """
    dropped_SBH = x_SBH if mask is None else mask.apply(x_SBH)
    y_SBO = lora_linear(dropped_SBH, weight_OH, None, a_RH, b_OR, communication=communication)
    # A gain near one would round to it in 16 bits; what it adds does not.
    y_SBO = torch.addcmul(y_SBO, y_SBO, (gain_O - 1).to(y_SBO.dtype))
    if mask is not None:
        nothing = a_RH.new_zeros(0, a_RH.shape[1]), b_OR.new_zeros(b_OR.shape[0], 0)
        y_SBO = y_SBO + lora_linear(x_SBH - dropped_SBH, weight_OH, None, *nothing, communication=communication)
    return y_SBO if bias_O is None else y_SBO + bias_O


@torch.no_grad()
def compute_row_squares(weight_OH: torch.Tensor) -> torch.Tensor:
    """[O], fp32 or wider; of this shard's part of each row."""
    dtype = torch.promote_types(weight_OH.dtype, torch.float32)
    squares_O: torch.Tensor = torch.linalg.vector_norm(weight_OH, dim=1, dtype=dtype).square()
    return squares_O


@torch.no_grad()
def compute_row_norms(
    base_squares_O: torch.Tensor,
    weight_OH: torch.Tensor,
    a_RH: torch.Tensor,
    b_OR: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """|W0 + B A| of each whole row, with no [O, H] tensor: |W0|^2 + 2 <W0 A^T, B> + <B A A^T, B>, row by row.

    `base_squares_O` are W0's, of this shard. `group` sums the parts of rows that are split over it; None where rows
    are whole. The factors are of `base_squares_O`'s dtype.
    """
    projected_OR = (a_RH.to(weight_OH.dtype) @ weight_OH.t()).t().to(b_OR.dtype)  # A's few rows as rows are quicker
    squares_O = base_squares_O + ((2 * projected_OR + b_OR @ (a_RH @ a_RH.t())) * b_OR).sum(1)
    return sum_row_squares(squares_O, group).clamp(min=0).sqrt()


@torch.no_grad()
def sum_row_squares(squares_O: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Of the whole rows."""
    if group is not None:
        squares_O = squares_O.clone()
        dist.all_reduce(squares_O, group=group)
    return squares_O
