"""How the frozen linears' weights may be stored: the formats, the shapes they take, their bytes; standard library only.

nf4 and fp8 keep one scale for 64 neighbouring weights of a row, mxfp4 one for 32. Blocks never cross rows or shards, so
a shard of the quantised weight is a slice of the whole quantised weight on every topology.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lora_dist.refusals import require

BASE_FORMATS = ("native", "nf4", "nf4_double", "fp8", "mxfp4")
BLOCK = 64
"""Weights that share a scale (QLoRA, arXiv:2305.14314, section 3), but in mxfp4."""
MXFP4_BLOCK = 32
"""OCP Microscaling Formats, version 1.0, section 5.2."""
_MAX_GROUP = 256
"""Scales that share a range in nf4_double (the paper's block size of the second level)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """The weight [out_features, in_features] of one linear, or of one tensor-parallel shard of it."""

    out_features: int
    in_features: int
    column_parallel: bool
    """True where TP splits the rows, False where it splits the columns."""

    @property
    def num_elements(self) -> int:
        return self.out_features * self.in_features

    @property
    def group_size(self) -> int:
        """Scales of one group of nf4_double: they lie along the dimension that TP leaves whole."""
        return _find_group_size(self.in_features // BLOCK if self.column_parallel else self.out_features)

    def cut(self, tp_size: int) -> "LinearShape":
        """One of `tp_size` shards."""
        rows, columns = (tp_size, 1) if self.column_parallel else (1, tp_size)
        return LinearShape(
            out_features=self.out_features // rows,
            in_features=self.in_features // columns,
            column_parallel=self.column_parallel,
        )


@cache
def _find_group_size(length: int) -> int:
    return max(size for size in range(1, min(length, _MAX_GROUP) + 1) if length % size == 0)


def find_block(base_format: str) -> int:
    """Weights that share a scale."""
    return MXFP4_BLOCK if base_format == "mxfp4" else BLOCK


def find_linear_format(base_format: str, *, of_experts: bool) -> str:
    """Of one linear: mxfp4 is for those of experts alone, as gpt-oss is published."""
    return "native" if base_format == "mxfp4" and not of_experts else base_format


def check_frozen(base_format: str, *, method: str, zero_stage: int) -> None:
    """ValueError where a run trains or partitions what `base_format` freezes."""
    if base_format != "native":
        key = f"model.base_format={base_format}"
        require(method != "full", f"{key} is frozen; method=full needs native: use lora, compare.methods=[lora]")
        require(zero_stage < 3, f"{key} is not partitioned by zero.stage=3; use zero.stage<=2")


def check_blocks(base_format: str, in_features: Mapping[str, int], tp_size: int = 1) -> None:
    """ValueError, with the numbers, where blocks would cross the ends of a row whose inputs TP splits.

    `in_features` are those of linears by name; 0 where a model has none of that name.
    """
    lower, block = "lower topology.tp_size or " if tp_size > 1 else "", find_block(base_format)
    for name, size in in_features.items():
        require(
            base_format == "native" or size % (block * tp_size) == 0,
            f"model.base_format={base_format} keeps one scale for {block} weights of a row, and the {size} inputs of"
            f" {name} over tp {tp_size} are no multiple of {block}; {lower}use model.base_format=native",
        )


def compute_weight_bytes(base_format: str, shape: LinearShape, native_itemsize: int) -> int:
    """Of one linear's weight as it is stored; exact."""
    if base_format == "native":
        return shape.num_elements * native_itemsize
    return sum(compute_buffer_bytes(base_format, shape).values())


def compute_buffer_bytes(base_format: str, shape: LinearShape) -> dict[str, int]:
    """Of each buffer of a quantised weight: 8.5 bits a weight (fp8), 4.5 (nf4), 4.25 (mxfp4), or 4.125 +
    1 / group_size.
    """
    codes = shape.num_elements if base_format == "fp8" else shape.num_elements // 2
    num_scales = shape.num_elements // find_block(base_format)
    if base_format == "nf4_double":
        return {"codes": codes, "scales": num_scales, "ranges": 8 * (num_scales // shape.group_size)}
    return {"codes": codes, "scales": num_scales if base_format == "mxfp4" else 4 * num_scales}
