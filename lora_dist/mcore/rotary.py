"""Rotary positions: angles of each row's own positions, and queries and keys turned by them.

Shapes: S sequence, B rows, A heads, D head dimension, F frequencies: D / 2, or fewer where only a head's first 2 F
features are turned.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.config import ModelConfig
from lora_dist.fusion import Chain
from lora_dist.mcore.gates import multiply_by_sigmoid
from lora_dist.mcore.norm import build_output_norm

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each [S, B, 1, F] in the model's dtype."""


@dataclass(frozen=True, slots=True)
class LayerAngles:
    """What turns a layer's queries and keys: the same tensors, unless queries grow with their position."""

    of_queries: Angles
    of_keys: Angles


class Rotary:
    """RoFormer's rotation (arXiv:2104.09864, section 3.2.2), halves of a head paired as Hugging Face pairs them."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies_F = compute_frequencies(model).to(device)
        self._local_frequencies_F: torch.Tensor | None = None
        if model.local_rope_theta is not None:
            self._local_frequencies_F = _compute_plain(model.local_rope_theta, model.rotary_size).to(device)
        self._magnitude = model.rope_scaling.get("attention_factor", 1.0)
        self._growth = model.query_growth
        self._first_context = model.rope_scaling.get("original_max_position_embeddings", 0.0)
        self._dtype = dtype

    def compute_angles(self, positions_BS: torch.Tensor) -> tuple[LayerAngles, LayerAngles]:
        """Of the layers that see everything and of those under a sliding window, where these have others.

        Positions may be any: packed examples count from their own start, generation from what it has kept.
        """
        angles = self._compute_layers(positions_BS, self._frequencies_F, self._magnitude)
        if self._local_frequencies_F is None:
            return angles, angles
        return angles, self._compute_layers(positions_BS, self._local_frequencies_F, 1.0)

    def _compute_layers(self, positions_BS: torch.Tensor, frequencies_F: torch.Tensor, magnitude: float) -> LayerAngles:
        """Queries that grow do so in their rotation, which is linear: no pass over them, and nothing kept a layer."""
        of_keys = self._compute(positions_BS, frequencies_F, magnitude)
        if self._growth == 0:
            return LayerAngles(of_keys, of_keys)
        num_contexts_SB1 = (positions_BS.t()[..., None] / self._first_context).floor()
        growth_SB1 = 1 + self._growth * num_contexts_SB1.log1p()
        return LayerAngles(self._compute(positions_BS, frequencies_F, magnitude * growth_SB1), of_keys)

    def _compute(
        self, positions_BS: torch.Tensor, frequencies_F: torch.Tensor, magnitude: float | torch.Tensor
    ) -> Angles:
        """The angle is formed in fp32 whatever the model's dtype: bf16 cannot tell position 256 from 257."""
        angles_SBF = positions_BS.t()[..., None].float() * frequencies_F
        cos_SBF, sin_SBF = angles_SBF.cos() * magnitude, angles_SBF.sin() * magnitude
        return cos_SBF.to(self._dtype)[:, :, None], sin_SBF.to(self._dtype)[:, :, None]


def compute_frequencies(model: ModelConfig) -> torch.Tensor:
    """[F] fp32, theta^(-f / F), scaled as model.rope_scaling and rope_divisors say."""
    frequencies_F = _compute_plain(model.rope_theta, model.rotary_size)
    scaling = model.rope_scaling
    if "low_freq_factor" in scaling:
        return _scale_as_llama3(frequencies_F, **scaling)
    if "beta_fast" in scaling:
        return _scale_as_yarn(frequencies_F, model)
    if model.rope_divisors:
        return frequencies_F / torch.tensor(model.rope_divisors)
    return frequencies_F / scaling.get("factor", 1.0)


def _compute_plain(theta: float, size: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


def _scale_as_llama3(
    frequencies_F: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    """Frequencies with few turns in the original context are divided by `factor`, those with many stay.

    `low_freq_factor` turns or fewer count as few, `high_freq_factor` or more as many; linear in the turns between
    (Llama 3.1, arXiv:2407.21783; its reference code's `apply_scaling`).
    """
    turns_F = original_max_position_embeddings * frequencies_F / (2 * math.pi)
    kept_F = ((turns_F - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept_F) * frequencies_F / factor + kept_F * frequencies_F


def _scale_as_yarn(frequencies_F: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Frequencies up to the one with `beta_fast` turns in the original context stay, those from the one with
    `beta_slow` turns on are divided by `factor`; linear in the frequency's index between (YaRN, arXiv:2309.00071,
    section 3.2, its bounds rounded outwards to whole features as its reference code does, but for truncate: 0).
    """
    scaling = model.rope_scaling

    def find_index(num_turns: float) -> float:
        wavelength = scaling["original_max_position_embeddings"] / num_turns
        return model.rotary_size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(model.rope_theta))

    first, last = find_index(scaling["beta_fast"]), find_index(scaling["beta_slow"])
    if "truncate" not in scaling:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, model.rotary_size - 1)
    index_F = torch.arange(len(frequencies_F), dtype=torch.float32)
    divided_F = ((index_F - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return divided_F * frequencies_F / scaling["factor"] + (1 - divided_F) * frequencies_F


def rotate(x_SBAD: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Every head turned; for backward only the angles are kept, which all layers share."""
    turned: torch.Tensor = _Rotate.apply(x_SBAD, *angles)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBAD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x_SBAD, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy_SBAD: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turn(dy_SBAD, cos, -sin), None, None


def _write_turned(x_SBAD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second, rest = _split(x_SBAD, cos)
    turned_SBAD = torch.empty_like(x_SBAD, memory_format=torch.contiguous_format)
    turned_first, turned_second, kept = _split(turned_SBAD, cos)
    kept.copy_(rest)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return turned_SBAD


def _join_turned(x_SBAD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second, rest = _split(x_SBAD, cos)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _split(x_SBAD: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The two halves that are turned, and the features that are not."""
    num_frequencies = cos.shape[-1]
    return x_SBAD.split([num_frequencies, num_frequencies, x_SBAD.shape[-1] - 2 * num_frequencies], dim=-1)


turn = Chain(_write_turned, compiled=_join_turned)
"""`x_SBAD` by the angles of cosines and sines; not known to autograd, as `rotate` is."""


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, whose queries and keys are turned by the angles that the model passes down; in some
    models with a norm on what it gives.

    Megatron would compute cosines and sines again in each layer, and keep them.
    """

    _angles: LayerAngles | None = None

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.turns = True
        self.output_layernorm = build_output_norm(config)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, rotary_pos_emb: tuple[LayerAngles, LayerAngles], **options: Any
    ) -> Any:
        self._angles = rotary_pos_emb[self.core_attention.sees_window]
        try:
            output, bias = super().forward(hidden_states, *args, rotary_pos_emb=None, **options)
        finally:
            self._angles = None
        if self.output_layernorm is None:
            return output, bias
        assert bias is None, "nothing but the norm's output is added to the residual stream"
        return self.output_layernorm(output), None

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """With what multiplies each head's output, where a model has it, at last."""
        query, key, *value_and_gate = super().get_query_key_value_tensors(*args, **options)
        assert self._angles is not None
        if self.turns:
            query, key = self._turn(query, key, self._angles)
        # Copies of their own: a view would keep the whole fused projection for backward.
        return tuple(one.contiguous() for one in (query, key, *value_and_gate))

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return multiply_by_sigmoid(x, gate.view_as(x))

    def _turn(
        self, query_SBAD: torch.Tensor, key_SBAD: torch.Tensor, angles: LayerAngles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(query_SBAD, angles.of_queries), rotate(key_SBAD, angles.of_keys)
