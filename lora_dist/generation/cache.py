"""What one layer keeps from step to step: keys and values, or latents, after any rotary embedding, or a state that does
not grow.

Shapes: R rows, A key-value heads of this rank, C columns that are run, L columns kept so far, D head dimension, J
columns before the next one, X features.
"""

import torch


class LayerCache:
    """Room for `num_rows` rows of `num_columns` columns, allocated once, at the first use."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.num_rows, self.num_columns, self.length = num_rows, num_columns, 0
        self._key_RALD: torch.Tensor | None = None
        self._value_RALD: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """0 before the first use."""
        return sum(kept.nbytes for kept in (self._key_RALD, self._value_RALD) if kept is not None)

    def append(self, key_RACD: torch.Tensor, value_RACD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new columns; keys and values [R, A, L, D] of all columns so far, views into the cache."""
        if self._key_RALD is None or self._value_RALD is None:
            self._key_RALD, self._value_RALD = self._allocate(key_RACD), self._allocate(value_RACD)
        num_rows, _, num_new, _ = key_RACD.shape
        first, self.length = self.length, self.length + num_new
        assert num_rows <= self.num_rows, f"{num_rows} rows in a cache of {self.num_rows}"
        assert self.length <= self.num_columns, f"{self.length} columns in a cache of {self.num_columns}"
        for kept, new in ((self._key_RALD, key_RACD), (self._value_RALD, value_RACD)):
            kept[:num_rows, :, first : self.length] = new
        return self._key_RALD[:num_rows, :, : self.length], self._value_RALD[:num_rows, :, : self.length]

    def select(self, source_R: torch.Tensor) -> None:
        """Row r becomes a copy of what was row source_R[r]; there may be more rows than before."""
        for kept in (self._key_RALD, self._value_RALD):
            assert kept is not None, "nothing is kept yet"
            filled = kept[:, :, : self.length]
            filled[: len(source_R)] = filled.index_select(0, source_R)

    def _allocate(self, like_RACD: torch.Tensor) -> torch.Tensor:
        _, num_heads, _, head_dim = like_RACD.shape
        return like_RACD.new_zeros(self.num_rows, num_heads, self.num_columns, head_dim)


class StateCache:
    """What a recurrent layer has of each row: its state, and the last columns that its convolution sees."""

    def __init__(self) -> None:
        self.length = 0
        """Columns run so far."""
        self.state: torch.Tensor | None = None
        """[R, ...]; None before the first use."""
        self.tails: torch.Tensor | None = None
        """[R, J, X]."""

    @property
    def num_bytes(self) -> int:
        """0 before the first use."""
        return sum(kept.nbytes for kept in (self.state, self.tails) if kept is not None)

    def keep(self, new_RCX: torch.Tensor, state: torch.Tensor, *, num_before: int) -> None:
        """The state after the new columns, and of these the last `num_before`; zeros where there are no more."""
        before = new_RCX.new_zeros(len(new_RCX), num_before, new_RCX.shape[2]) if self.tails is None else self.tails
        joined = torch.cat([before, new_RCX], dim=1)
        self.state, self.tails = state, joined[:, joined.shape[1] - num_before :].clone()
        self.length += new_RCX.shape[1]

    def select(self, source_R: torch.Tensor) -> None:
        """As `LayerCache.select`."""
        assert self.state is not None, "nothing is kept yet"
        assert self.tails is not None
        self.state, self.tails = self.state.index_select(0, source_R), self.tails.index_select(0, source_R)
