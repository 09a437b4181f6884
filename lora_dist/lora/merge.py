"""An adapter added into a weight shard and taken out again, in place and with nothing communicated.

The sum is formed in fp32 and rounded once. What unmerging puts back is not computed but kept: subtracting an update
from a rounded sum gives the base back only nearly, and the loss grows with every cycle.

Shapes: O output features, H input features.
"""

import torch

from lora_dist.lora.experts import ExpertAdapter
from lora_dist.lora.layer import LoraShard


class WeightMerge:
    """One weight shard, with at most one adapter in it, and the base rows that the adapter replaced.

    Those rows are the memory it costs: what the adapted projections' own weights take, and nothing for the others.
    """

    def __init__(self, weight_OH: torch.Tensor, *, keep_base: bool = True) -> None:
        """Without `keep_base` a merge costs no memory and is for good."""
        self.weight_OH, self.keep_base = weight_OH, keep_base
        self._kept: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}

    @property
    def kept_bytes(self) -> int:
        return sum(base.nbytes for _, base in self._kept.values())

    @torch.no_grad()
    def merge(self, shard: LoraShard | ExpertAdapter | None) -> None:
        """Base plus `shard`, whatever was merged before; None leaves the base alone, bit for bit."""
        blocks = [] if shard is None else shard.list_rows()
        targets = {spec.target for spec, _ in blocks}
        for target in [target for target in self._kept if target not in targets]:
            self._write(*self._kept.pop(target))
        for spec, rows in blocks:
            assert shard is not None
            base_OH = self._kept[spec.target][1] if spec.target in self._kept else self._read(rows)
            if self.keep_base:
                self._kept[spec.target] = (rows, base_OH)
            self._write(rows, shard.compute_merged(spec, base_OH))

    def _read(self, rows: torch.Tensor | None) -> torch.Tensor:
        return self.weight_OH.clone() if rows is None else self.weight_OH.index_select(0, rows)

    def _write(self, rows: torch.Tensor | None, value_OH: torch.Tensor) -> None:
        if rows is None:
            self.weight_OH.copy_(value_OH)
        else:
            self.weight_OH.index_copy_(0, rows, value_OH.to(self.weight_OH.dtype))
