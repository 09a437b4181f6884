"""Attention whose queries, keys and values come from latents (arXiv:2405.04434, section 2.1), its heads TP-sharded.

Every TP rank computes the latents whole, of its own part of the sequence under sequence parallelism; what enters the
ranks' heads is the latents and the one turned key side by side, a tensor several times narrower than the hidden one.
Step by step the model keeps the latent of keys and values and the key, turned, and on every rank the whole of them.

Shapes: S sequence, B rows, H hidden, L a latent, A heads of this rank, D features of a head's query and key, V of its
value, N those of D that positions do not turn, R those that they do, K positions that are kept, X = L + R.
"""

from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.generation.cache import LayerCache
from lora_dist.lora.mixed import MixedLoraShard
from lora_dist.mcore.attention import LayerMasks, Mask
from lora_dist.mcore.indexer import Indexer, Selected, Selecting
from lora_dist.mcore.latent_steps import attend_to_latents, find_visible, read_whole_weight
from lora_dist.mcore.layers import (
    LoraColumnParallelLinear,
    LoraLocalLinear,
    LoraRowParallelLinear,
    LoraWholeLinear,
    bring_to_ranks,
)
from lora_dist.mcore.norm import RmsNorm
from lora_dist.mcore.rotary import Angles, LayerAngles, rotate
from lora_dist.mcore.selected_attention import SelectedAttention

_LATENT_EPSILON = 1e-6
"""Of the latents' norms, whatever the model's other norms have: transformers' DeepseekV3RMSNorm."""


class LatentAttention(nn.Module):
    """In place of Megatron's self-attention, with its constructor: `config.model` says what there is to build."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.config = config
        self.model: ModelConfig = config.model
        model, heads = self.model, self.model.num_heads // config.tensor_model_parallel_size
        self.unturned_size = model.head_dim - model.rotary_size
        if model.query_latent_size is None:
            self.linear_q_proj = self._build_split_linear(
                LoraColumnParallelLinear, model.hidden_size, model.query_size, gather_output=False
            )
        else:
            self.linear_q_down_proj = LoraWholeLinear(config, model.query_latent_size, model.hidden_size)
            self.q_latent_layernorm = RmsNorm(config, model.query_latent_size, _LATENT_EPSILON)
            self.linear_q_up_proj = LoraLocalLinear(
                config, heads * model.head_dim, model.query_latent_size, column_parallel=True
            )
        assert model.kv_latent_size is not None
        self.linear_kv_down_proj = LoraWholeLinear(config, model.kv_latent_size + model.rotary_size, model.hidden_size)
        self.kv_latent_layernorm = RmsNorm(config, model.kv_latent_size, _LATENT_EPSILON)
        self.linear_kv_up_proj = LoraLocalLinear(
            config, heads * (self.unturned_size + model.value_dim), model.kv_latent_size, column_parallel=True
        )
        self.core_attention = SelectedAttention(config)
        self.cache: LayerCache | None = None
        """Where the model runs step by step: latents and turned keys side by side, one head of keys without values."""
        self.indexer: Indexer | None = None
        """Where rows are long enough for one (`lora_dist.mcore.indexer_weights`)."""
        self.indexer_layer = 0
        """Global index of the layer whose indexer picks for this one."""
        self.lends_selection = False
        """Whether it picks for the next one too."""
        self.linear_proj = self._build_split_linear(
            LoraRowParallelLinear, model.context_size, model.hidden_size, input_is_parallel=True
        )

    def _build_split_linear(self, kind: type, in_features: int, out_features: int, **options: bool) -> Any:
        return kind(
            in_features,
            out_features,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=True,
            tp_group=ps.get_tensor_model_parallel_group(),
            **options,
        )

    def forward(
        self,
        hidden_SBH: torch.Tensor,
        attention_mask: Mask | LayerMasks | Selecting,
        *,
        rotary_pos_emb: tuple[LayerAngles, LayerAngles],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The output, under sequence parallelism this rank's share as the input is, and no bias."""
        angles = rotary_pos_emb[self.core_attention.sees_window]
        queries, q_latent_SBL, kv_latent_SBL, turned_key = self._enter(hidden_SBH)
        query_SBAD = self._make_queries(queries, angles.of_queries)
        turned_SBR = self._turn(turned_key[:, :, None], angles.of_keys)[:, :, 0]
        if isinstance(attention_mask, Selecting):
            assert q_latent_SBL is not None, "the model's configuration asks for it"
            attention_mask = self._select(hidden_SBH, q_latent_SBL, angles.of_keys, attention_mask)
        if self.cache is None:
            context = self._attend(query_SBAD, kv_latent_SBL, turned_SBR, attention_mask)
        else:
            context = self._attend_to_kept(query_SBAD, self._keep(kv_latent_SBL, turned_SBR), attention_mask)
        return self.linear_proj(context)[0], None

    def _attend(
        self,
        query_SBAD: torch.Tensor,
        kv_latent_KBL: torch.Tensor,
        turned_KBR: torch.Tensor,
        mask: Mask | LayerMasks | Selected,
    ) -> torch.Tensor:
        """[S, B, A V]."""
        key_KBAD, value_KBAV = self._make_keys_and_values(kv_latent_KBL, turned_KBR)
        return self.core_attention(query_SBAD, key_KBAD, value_KBAV, mask)

    def _keep(self, kv_latent_SBL: torch.Tensor, turned_SBR: torch.Tensor) -> torch.Tensor:
        """[B, K, X] of all positions so far, a view into the cache."""
        assert self.cache is not None
        new_B1SX = torch.cat([kv_latent_SBL, turned_SBR], dim=-1).transpose(0, 1)[:, None]
        return self.cache.append(new_B1SX, new_B1SX[..., :0])[0][:, 0]

    def _attend_to_kept(
        self, query_SBAD: torch.Tensor, kept_BKX: torch.Tensor, mask: Mask | LayerMasks | Selected
    ) -> torch.Tensor:
        """[S, B, A V]; keys and values are made for several positions, and where what makes them has adapters of which
        each row may have its own.
        """
        up_proj = self.linear_kv_up_proj
        if len(query_SBAD) > 1 or isinstance(up_proj.lora, MixedLoraShard):
            # In a plain layout, or matmul would make one small product a row of one large one.
            latent_BKL, turned_BKR = kept_BKX.split([self.model.kv_latent_size, self.model.rotary_size], dim=-1)
            latent_KBL = latent_BKL.transpose(0, 1).contiguous()
            return self._attend(query_SBAD, latent_KBL, turned_BKR.transpose(0, 1), mask)
        scale = self.core_attention.scale
        context_BAV = attend_to_latents(
            query_SBAD[0],
            kept_BKX,
            read_whole_weight(up_proj, query_SBAD.dtype),
            find_visible(mask, kept_BKX.shape[1]),
            value_dim=self.model.value_dim,
            scale=self.model.head_dim**-0.5 if scale is None else scale,
        )
        return context_BAV.flatten(1)[None]

    def _select(
        self, hidden_SBH: torch.Tensor, q_latent_SBL: torch.Tensor, angles: Angles, selecting: Selecting
    ) -> Selected:
        """By this layer's own indexer, unless it has picked for this microbatch already, or by an earlier one's."""
        selection = selecting.picked.get(self.indexer_layer)
        if selection is None:
            assert self.indexer is not None, "the stage with its indexer has this layer too"
            selection = self.indexer.pick(hidden_SBH, q_latent_SBL, angles, selecting.mask)
            if self.lends_selection:
                selecting.keep(self.indexer_layer, selection)
        return Selected(selecting.mask, selection)

    def _enter(self, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Of the whole sequence: this rank's queries [S, B, A D], the latent of queries where they have one, that of
        keys and values, and the key [S, B, R] that is to be turned.
        """
        kv_size, turned_size = self.model.kv_latent_size, self.model.rotary_size
        kv_latent_SBL, turned_key = self.linear_kv_down_proj(hidden_SBH).split([kv_size, turned_size], dim=-1)
        parts = [self.kv_latent_layernorm(kv_latent_SBL), turned_key]
        if self.model.query_latent_size is None:
            entered = bring_to_ranks(torch.cat(parts, dim=-1), self.config)
            return self.linear_q_proj(hidden_SBH)[0], None, *entered.split([kv_size, turned_size], dim=-1)
        q_latent_SBL = self.q_latent_layernorm(self.linear_q_down_proj(hidden_SBH))
        entered = bring_to_ranks(torch.cat([q_latent_SBL, *parts], dim=-1), self.config)
        q_latent_SBL, kv_latent_SBL, turned_key = entered.split([q_latent_SBL.shape[-1], kv_size, turned_size], dim=-1)
        return self.linear_q_up_proj(q_latent_SBL), q_latent_SBL, kv_latent_SBL, turned_key

    def _make_queries(self, queries: torch.Tensor, angles: Angles) -> torch.Tensor:
        """[S, B, A, D] of [S, B, A D], each head's last R features turned."""
        query_SBAD = queries.unflatten(-1, (-1, self.model.head_dim))
        unturned_SBAN, turned_SBAR = query_SBAD.split([self.unturned_size, self.model.rotary_size], dim=-1)
        return torch.cat([unturned_SBAN, self._turn(turned_SBAR, angles)], dim=-1)

    def _make_keys_and_values(
        self, kv_latent_SBL: torch.Tensor, turned_SBR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, B, A, D] and [S, B, A, V]; the turned part of the key is the same in all heads."""
        sizes = [self.unturned_size, self.model.value_dim]
        heads = self.linear_kv_up_proj(kv_latent_SBL).unflatten(-1, (-1, sum(sizes)))
        unturned_SBAN, value_SBAV = heads.split(sizes, dim=-1)
        turned_SBAR = turned_SBR[:, :, None].expand(-1, -1, unturned_SBAN.shape[2], -1)
        # The value's own copy: a view would keep the whole projection for backward.
        return torch.cat([unturned_SBAN, turned_SBAR], dim=-1), value_SBAV.contiguous()

    def _turn(self, x_SBAR: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Pairs of neighbours come out half of R apart, alike in queries and keys, which their products do not show."""
        if self.model.rope_interleaved:
            x_SBAR = x_SBAR.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x_SBAR, angles)
