"""The sizes of a gated DeltaNet, of a whole layer or of one TP rank's key heads; standard library only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaSizes:
    """Heads and their features. All tensors of a layer lie key head by key head, which is how TP splits them."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel_size: int
    apart: bool = False
    """Whether queries, keys, values and each gate come out of linears, or rows of one, of their own."""

    def cut(self, tp_size: int) -> "DeltaSizes":
        """One of `tp_size` shards."""
        return replace(self, key_heads=self.key_heads // tp_size, value_heads=self.value_heads // tp_size)

    @property
    def values_per_key(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def value_dim(self) -> int:
        """Features of all value heads together."""
        return self.value_heads * self.value_size

    @property
    def convolved_per_key(self) -> int:
        """Of a key head, features that pass the convolution: its query, its key and the values that share it."""
        return 2 * self.key_size + self.values_per_key * self.value_size

    @property
    def projected_per_key(self) -> dict[str, int]:
        """Of a key head, features out of the linears that are one here: those and as many of the output gate as of the
        values; then the gates of writing and of forgetting.
        """
        values, heads = self.values_per_key * self.value_size, self.values_per_key
        if self.apart:
            inputs = {"in_proj_q": self.key_size, "in_proj_k": self.key_size, "in_proj_v": values}
            return inputs | {"in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        return {"in_proj_qkvz": self.convolved_per_key + values, "in_proj_ba": 2 * heads}

    @property
    def convolved_parts(self) -> dict[str, int]:
        """Of a key head, what is convolved, one after the other; stored apart, each of all heads together."""
        key, value = self.key_size, self.values_per_key * self.value_size
        return {"conv_query": key, "conv_key": key, "conv_value": value}
