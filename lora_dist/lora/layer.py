"""The adapters of one linear on one tensor-parallel shard, applied through the fused function.

Shapes: S sequence, B rows, H input features, O output features, R the summed ranks of the stacked adapters.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.delta_sizes import DeltaSizes
from lora_dist.lora.dora import compute_row_norms, compute_row_squares, dora_linear, sum_row_squares
from lora_dist.lora.dropout import DropoutClock, DropoutMask
from lora_dist.lora.factors import draw_lora_A, slice_shard
from lora_dist.lora.function import BaseWeight, ShardCommunication, lora_linear, read_weight
from lora_dist.lora.spec import AdapterSpec
from lora_dist.row_shard import WHOLE_ROW, RowShard

Ranges = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlace:
    """Where a linear's shard lies within the whole linear."""

    column_parallel: bool
    """True where the output features are split over TP, False where the input features are."""
    tp_size: int
    tp_rank: int
    sequence_parallel: bool = False
    row_shard: RowShard = WHOLE_ROW
    """What enters of each row, before sequence parallelism cuts it."""
    tp_ranges: Mapping[str, Ranges] = field(default_factory=dict)
    """Of targets whose rows several ranks have, where each rank's lie."""
    is_whole: bool = False
    """Every rank has all of the linear, whatever tp_size."""
    row_group: dist.ProcessGroup | None = None
    """Over which an output row is split: the TP group where the input features are; None where rows are whole."""

    @property
    def a_shard_dim(self) -> int | None:
        return None if self.column_parallel else 1

    @property
    def b_shard_dim(self) -> int | None:
        return 0 if self.splits_rows else None

    @property
    def splits_rows(self) -> bool:
        return self.column_parallel and not self.is_whole

    def has_partial_grad(self, shard_dim: int | None) -> bool:
        """Whether each rank computes one summand of the gradient of a parameter that is split along `shard_dim`."""
        if self.is_whole:  # the ranks compute the same, or each its part of the sequence
            return self.sequence_parallel
        return self.tp_size > 1 and shard_dim is None


class LoraShard(nn.Module):
    """One adapter, or several over disjoint output rows (q, k, v of a fused projection), beside a frozen linear.

    Parameters are fp32 and named `{target}_lora_A`, `{target}_lora_B` and, with DoRA, `{target}_lora_magnitude`; they
    are cast to the input's dtype on use.
    """

    def __init__(
        self,
        specs: Sequence[AdapterSpec],
        place: ShardPlace,
        *,
        seed: int,
        clock: DropoutClock,
        local_out_features: int,
        rows: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`rows[target]`: the local output rows that target's B writes; None where one adapter writes all."""
        super().__init__()
        assert rows is not None or len(specs) == 1, "several adapters on one linear need to know their rows"
        self.specs, self.place, self.clock, self.seed = tuple(specs), place, clock, seed
        self.local_out_features = local_out_features
        for spec in specs:
            a = slice_shard(draw_lora_A(spec, seed), place.a_shard_dim, place.tp_size, place.tp_rank)
            out_features = spec.out_features // (place.tp_size if place.splits_rows else 1)
            if rows is not None:
                out_features = len(rows[spec.target])
            self.register_parameter(f"{spec.target}_lora_A", nn.Parameter(a.to(device)))
            b = torch.zeros(out_features, spec.stacked_rank, device=device)
            self.register_parameter(f"{spec.target}_lora_B", nn.Parameter(b))
            if spec.use_dora:
                length = nn.Parameter(torch.ones(out_features, device=device))
                self.register_parameter(f"{spec.target}_lora_magnitude", length)
        self._base_squares_O: torch.Tensor | None = None
        stacked_rows = None if rows is None else torch.cat([rows[spec.target] for spec in specs]).to(device)
        self.stacked_rows: torch.Tensor | None
        self.register_buffer("stacked_rows", stacked_rows, persistent=False)

    def factors(self, spec: AdapterSpec) -> tuple[nn.Parameter, nn.Parameter]:
        """This shard's A and B of one adapter."""
        return self.get_parameter(f"{spec.target}_lora_A"), self.get_parameter(f"{spec.target}_lora_B")

    @property
    def use_dora(self) -> bool:
        return self.specs[0].use_dora

    def magnitude(self, spec: AdapterSpec) -> nn.Parameter:
        """This shard's lengths of one adapter's output rows."""
        return self.get_parameter(f"{spec.target}_lora_magnitude")

    @torch.no_grad()
    def start_magnitudes(self, weight_OH: BaseWeight) -> None:
        """Set the lengths to those of the base's rows, which B = 0 leaves as they are. Collective over TP where rows
        are split.
        """
        self._base_squares_O = compute_row_squares(read_weight(weight_OH, torch.float32))
        lengths_O = self.compute_base_lengths()
        for spec, rows in self.list_rows():
            self.magnitude(spec).copy_(lengths_O if rows is None else lengths_O[rows])

    def compute_base_lengths(self) -> torch.Tensor:
        """[O]; of the base's rows, those that no adapter writes included."""
        assert self._base_squares_O is not None, "start_magnitudes has not been called"
        return sum_row_squares(self._base_squares_O, self.place.row_group).sqrt()

    def forward(
        self,
        x_SBH: torch.Tensor,
        weight_OH: BaseWeight,
        bias_O: torch.Tensor | None,
        communication: ShardCommunication,
    ) -> torch.Tensor:
        a_RH, b_OR = self.stack_factors(x_SBH.dtype)
        mask = self._build_mask(x_SBH)
        if self.use_dora:
            gain_O = self._compute_gain(read_weight(weight_OH, x_SBH.dtype))
            return dora_linear(x_SBH, weight_OH, bias_O, a_RH, b_OR, gain_O, mask=mask, communication=communication)
        return lora_linear(x_SBH, weight_OH, bias_O, a_RH, b_OR, mask=mask, communication=communication)

    def stack_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, H] stacked and B [O, R] in blocks on each adapter's rows, scaled: x A^T B^T is the whole update.

        One B with zero blocks costs one pass over the output where one B an adapter would cost several.
        """
        pairs = [self.factors(spec) for spec in self.specs]
        scaled_bs = [b * spec.scaling for (_, b), spec in zip(pairs, self.specs, strict=True)]
        if self.stacked_rows is None:
            return pairs[0][0].to(dtype), scaled_bs[0].to(dtype)
        a_RH = torch.cat([a for a, _ in pairs])
        block = torch.block_diag(*scaled_bs)
        b_OR = block.new_zeros(self.local_out_features, a_RH.shape[0]).index_copy(0, self.stacked_rows, block)
        return a_RH.to(dtype), b_OR.to(dtype)

    def _build_mask(self, x_SBH: torch.Tensor) -> DropoutMask | None:
        probability = self.specs[0].dropout
        if probability == 0.0 or not self.training or self.clock.row_keys_B is None:
            return None
        place, num_positions = self.place, x_SBH.shape[0]
        return DropoutMask(
            row_keys_B=self.clock.row_keys_B,
            adapter_name="+".join(spec.name for spec in self.specs),
            probability=probability,
            row_shard=place.row_shard,
            num_positions=num_positions * (place.tp_size if place.sequence_parallel else 1),
            position_offset=place.tp_rank * num_positions if place.sequence_parallel else 0,
            feature_offset=0 if place.column_parallel else place.tp_rank * x_SBH.shape[2],
        )

    def _compute_gain(self, weight_OH: torch.Tensor) -> torch.Tensor:
        """[O]; 1 on the rows of no adapter. The norm is a constant to autograd."""
        assert self._base_squares_O is not None, "start_magnitudes has not been called"
        squares_O = self._base_squares_O
        a_RH, b_OR = self.stack_factors(squares_O.dtype)
        norms_O = compute_row_norms(squares_O, weight_OH, a_RH, b_OR, self.place.row_group)
        lengths = torch.cat([self.magnitude(spec) for spec in self.specs])
        if self.stacked_rows is None:
            return lengths / norms_O
        gains = lengths / norms_O[self.stacked_rows]
        return gains.new_ones(self.local_out_features).index_copy(0, self.stacked_rows, gains)

    def list_rows(self) -> list[tuple[AdapterSpec, torch.Tensor | None]]:
        """Each adapter with its local output rows, None where it writes all."""
        if self.stacked_rows is None:
            return [(self.specs[0], None)]
        sizes = [self.factors(spec)[1].shape[0] for spec in self.specs]
        return list(zip(self.specs, self.stacked_rows.split(sizes), strict=True))

    @torch.no_grad()
    def compute_merged(self, spec: AdapterSpec, base_OH: torch.Tensor) -> torch.Tensor:
        """The base's rows of one adapter with it in them, in fp32, or fp64 where W is: the caller rounds it once.

        Communicates nothing, except with DoRA where rows are split over TP.
        """
        (a, b), dtype = self.factors(spec), torch.promote_types(base_OH.dtype, torch.float32)
        merged_OH = torch.addmm(base_OH.to(dtype), (b * spec.scaling).to(dtype), a.to(dtype))
        if spec.use_dora:
            norms_O = sum_row_squares(compute_row_squares(merged_OH), self.place.row_group).sqrt()
            merged_OH *= (self.magnitude(spec).to(dtype) / norms_O)[:, None]
        return merged_OH


def compute_qkv_rows(
    num_groups: int, num_query_heads_per_group: int, head_dim: int, *, gated: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of q, k and v in Megatron's fused projection of `num_groups` local query groups.

    Megatron lays out each group as its query heads, `gated` then their gates, then its key head, then its value head.
    Rows of a target come in the order of its heads, which is the order of the separate projection: there each query
    head's gate is just after it.
    """
    num_kinds = 2 if gated else 1
    num_queries = num_kinds * num_query_heads_per_group
    row = torch.arange(num_groups * (num_queries + 2) * head_dim).view(num_groups, num_queries + 2, head_dim)
    queries = row[:, :num_queries].unflatten(1, (num_kinds, num_query_heads_per_group))
    return {
        "q_proj": queries.transpose(1, 2).flatten(),
        "k_proj": row[:, num_queries].flatten(),
        "v_proj": row[:, num_queries + 1].flatten(),
    }


def compute_fused_rows(target: str, model: ModelConfig, layer: int, tp_size: int = 1) -> dict[str, torch.Tensor] | None:
    """Rows of each target in a TP rank's shard of the linear that fuses `target` with others; None where none does.

    Megatron lays out a gated MLP's shard as all of its gate, then all of its up.
    """
    if target in ("gate_proj", "up_proj") and model.architecture.gated:
        return _split_gated(("gate_proj", "up_proj"), model.find_mlp_size(layer) // tp_size)
    if target in ("shared_gate_proj", "shared_up_proj"):
        assert model.shared_ffn_size is not None
        return _split_gated(("shared_gate_proj", "shared_up_proj"), model.shared_ffn_size // tp_size)
    if model.has_delta_net(layer):
        return _compute_delta_rows(target, model.delta_sizes.cut(tp_size))
    if target not in ("q_proj", "k_proj", "v_proj") or model.architecture.latent_attention:
        return None
    num_groups = max(model.num_query_groups, tp_size)
    gated = model.architecture.gated_attention
    return compute_qkv_rows(num_groups // tp_size, model.num_heads // num_groups, model.head_dim, gated=gated)


def _compute_delta_rows(target: str, sizes: DeltaSizes) -> dict[str, torch.Tensor] | None:
    """Of a gated DeltaNet's fused linear, or of its kernels, which are stored as those of queries, of keys and of
    values.
    """
    for parts in (sizes.projected_per_key, sizes.convolved_parts):
        if target in parts:
            row = torch.arange(sizes.key_heads * sum(parts.values())).view(sizes.key_heads, -1)
            rows = row.split(list(parts.values()), dim=1)
            return {name: own.flatten() for name, own in zip(parts, rows, strict=True)}
    return None


def _split_gated(targets: tuple[str, str], size: int) -> dict[str, torch.Tensor]:
    return {target: torch.arange(first, first + size) for target, first in zip(targets, (0, size), strict=True)}


@functools.cache
def _split_fused_qkv(num_heads: int, num_groups: int, head_dim: int, tp_size: int, gated: bool) -> dict[str, Ranges]:
    """Of q, k, v alone and of the fused projection where ranks share a key-value head: by tp_rank, start and length."""
    num_kinds, num_queries = 2 if gated else 1, num_heads // num_groups
    ranks_of_head, rows_per_group = tp_size // num_groups, (num_kinds * num_queries + 2) * head_dim
    q_size = num_heads // tp_size * head_dim
    ranges: dict[str, list[tuple[tuple[int, int], ...]]] = {"k_proj": [], "v_proj": [], "fused": []}
    for tp_rank in range(tp_size):
        group, place = divmod(tp_rank, ranks_of_head)
        first, key = group * rows_per_group, (group + 1) * rows_per_group - 2 * head_dim
        head = (group * head_dim, head_dim)
        ranges["k_proj"].append((head,))
        ranges["v_proj"].append((head,))
        queries = [(first + (kind * num_queries * head_dim) + place * q_size, q_size) for kind in range(num_kinds)]
        ranges["fused"].append((*queries, (key, head_dim), (key + head_dim, head_dim)))
    return {name: tuple(each) for name, each in ranges.items()}


def find_shared_ranges(model: ModelConfig, tp_size: int) -> Mapping[str, Ranges]:
    """`TrainableParameter.tp_ranges` of k's and v's rows and of the `fused` projection's; {} where no rank shares any.

    With more TP ranks than key-value heads, each head is on the neighbouring ranks that its query heads are split over.
    """
    if tp_size <= model.num_query_groups:
        return {}
    gated = model.architecture.gated_attention
    return _split_fused_qkv(model.num_heads, model.num_query_groups, model.head_dim, tp_size, gated)
