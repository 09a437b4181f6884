"""Megatron's GPTModel in each family's form: its specification, its loss, and one shard of it built.

Shapes: S sequence, B rows, H hidden, V vocabulary rows of this rank, N target tokens.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from lora_dist.base_shapes import list_stage_layers
from lora_dist.config import ModelConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.attention import LayerMasks, Mask, SdpaAttention, SinkAttention, compute_window_mask
from lora_dist.mcore.delta_net import DeltaHeads, GatedDeltaNet
from lora_dist.mcore.experts import ExpertMlp
from lora_dist.mcore.gates import GeGlu, SwiGlu
from lora_dist.mcore.head_loss import compute_target_loss
from lora_dist.mcore.indexer import Selecting
from lora_dist.mcore.latent_attention import LatentAttention
from lora_dist.mcore.layers import (
    Layer,
    LoraColumnParallelLinear,
    LoraRowParallelLinear,
    NormedLayer,
    ParallelLayer,
    ScaledAddition,
)
from lora_dist.mcore.norm import find_norm
from lora_dist.mcore.rotary import Rotary, RotarySelfAttention
from lora_dist.mcore.row_group import RowGroup
from lora_dist.mcore.transformer_config import build_transformer_config
from lora_dist.mcore.whole_norm import WholeNormedSelfAttention
from lora_dist.topology import Topology

_VOCAB_ROWS_MULTIPLE = 8
"""Each rank's vocabulary rows are a multiple of this, for the GPU's matrix units."""


class ShardedGpt(GPTModel):
    """One pipeline stage's tensor-parallel shard. With labels the last stage returns the summed loss, else logits."""

    def __init__(self, *args: Any, model: ModelConfig, topology: Topology, clock: DropoutClock, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model, self.topology, self.clock = model, topology, clock
        self.true_vocab_size = model.vocab_size
        self.position_offset = model.architecture.position_offset
        self.rotary: Rotary | None = None
        if model.architecture.rotary:
            self.rotary = Rotary(model, self.config.params_dtype, topology.device)
        self.indexes = False
        """Whether indexers are there, for rows that are longer than what they pick."""
        self.label_smoothing = 0.0
        self.only_last_position = False
        """Compute logits for the last position alone."""
        self.attends_in_blocks = True
        """Whether packed examples attend one by one, or whole rows with a bias that keeps them apart."""
        self.slots_BS: torch.Tensor | None = None
        """As `Batch.slots_BS` of the microbatch whose forward pass runs."""

    @property
    def stage_layers(self) -> range:
        """Global indices of this stage's layers."""
        return list_stage_layers(self.model, self.topology.pp_rank, self.topology.pp_size)

    @property
    def num_stage_layers(self) -> int:
        return len(self.stage_layers)

    @property
    def has_dropout(self) -> bool:
        """True where the base itself drops activations."""
        return self.config.hidden_dropout > 0 or self.config.attention_dropout > 0

    @property
    def first_layer(self) -> int:
        """Global index of this stage's first layer."""
        return self.stage_layers.start

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: Mask | LayerMasks,
        **options: Any,
    ) -> torch.Tensor:
        """`attention_mask` as `SdpaAttention` takes it; None means that rows are causal, within the model's window."""
        window = self.model.sliding_window if self.topology.cp_size == 1 else None
        if attention_mask is None and window is not None and input_ids.shape[1] > window:
            whole_rows, dtype = torch.zeros_like(input_ids[:1]), self.config.params_dtype
            windowed = compute_window_mask(whole_rows, dtype, window, drops=self.config.attention_dropout > 0)
            attention_mask = LayerMasks(full=None, windowed=windowed)
        if self.indexes:
            attention_mask = Selecting(attention_mask, keeps_all=self.training)
        output: torch.Tensor = super().forward(input_ids, position_ids, attention_mask, **options)
        return output

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        if self.position_offset:
            position_ids = position_ids + self.position_offset
        decoder_input, angles, *rest = super()._preprocess(input_ids, position_ids, **options)
        if self.rotary is not None:
            angles = self.rotary.compute_angles(position_ids)
        return decoder_input, angles, *rest

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The output layer's own weight where it has one, else the embedding, whichever copy this stage holds."""
        if self.post_process and not self.share_embeddings_and_output_weights:
            return self.output_layer.weight
        return super().shared_embedding_or_output_weight()

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        labels_BS, targets_N = options.get("labels"), options.get("loss_mask")
        if self.post_process and self.only_last_position:
            hidden_states = hidden_states[-1:]
        if not self.post_process or labels_BS is None:
            output: torch.Tensor = super()._postprocess(hidden_states, *args, **options)
            is_divided = self.post_process and self.model.logits_divisor != 1.0
            return output / self.model.logits_divisor if is_divided else output
        return self._compute_loss(hidden_states, labels_BS, targets_N)

    def _compute_loss(self, hidden_SBH: torch.Tensor, labels_BS: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over the target tokens (eq. 1 of the paper); the output layer sees no others.

        `targets_N` are their places in [S, B], where Megatron's argument would be a mask, and -1 for nothing:
        `Batch.find_targets`.
        """
        hidden_SBH = self._enter_output_layer(hidden_SBH)
        places_N = targets_N.clamp(min=0)
        return compute_target_loss(
            hidden_SBH.flatten(0, 1).index_select(0, places_N),
            self.shared_embedding_or_output_weight(),
            labels_BS.t().flatten()[places_N].where(targets_N >= 0, -1),
            vocab_size=self.true_vocab_size,
            logits_divisor=self.model.logits_divisor,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            tp_rank=self.topology.tp_rank,
            group=self.topology.tp_group if self.topology.tp_size > 1 else None,
        )

    def _enter_output_layer(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The whole sequence on every TP rank; backward sums the ranks' gradients."""
        if self.topology.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_SBH, group=self.topology.tp_group)
        return copy_to_tensor_model_parallel_region(hidden_SBH, group=self.topology.tp_group)


def compute_padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    multiple = _VOCAB_ROWS_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def build_model(
    model: ModelConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    clock: DropoutClock,
    recompute: str = "none",
    num_recomputed: int | None = None,
) -> ShardedGpt:
    """This process's shard, on its device, its weights not yet set; its first `num_recomputed` layers recompute."""
    config = build_transformer_config(model, topology, dtype)
    gpt = ShardedGpt(
        config=config,
        transformer_layer_spec=_build_block_spec(model, topology),
        vocab_size=compute_padded_vocab_size(model.vocab_size, topology.tp_size),
        max_sequence_length=model.max_position_embeddings + model.architecture.position_offset,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        position_embedding_type="none" if model.architecture.rotary else "learned_absolute",
        share_embeddings_and_output_weights=model.tied_output,
        model=model,
        topology=topology,
        clock=clock,
    )
    for number, layer in enumerate(gpt.decoder.layers, gpt.first_layer):
        layer.clock = clock
        _set_up_core(layer.self_attention.core_attention, number, model, topology)
        if number in model.unturned_layers:
            layer.self_attention.turns = False
        if model.residual_multiplier != 1.0:
            layer.self_attn_bda = layer.mlp_bda = ScaledAddition(model.residual_multiplier)
    if topology.is_first_stage and not model.architecture.drops_embedding:
        gpt.embedding.embedding_dropout.p = 0.0
    scale = _find_embedding_scale(model, dtype)
    if scale != 1.0 and topology.is_first_stage:
        gpt.embedding.word_embeddings.register_forward_hook(partial(_scale, scale=scale))
    for layer in gpt.decoder.layers[:num_recomputed]:
        layer.recompute = recompute
    if topology.is_first_stage and topology.pp_size > 1:
        gpt.embedding.register_forward_hook(_require_grad)
    return gpt.to(device=topology.device, dtype=dtype)


def _set_up_core(core: SdpaAttention | DeltaHeads, number: int, model: ModelConfig, topology: Topology) -> None:
    """What the core of layer `number` has of its own."""
    core.sees_window = model.sees_window(number)
    if topology.cp_size > 1:
        core.row_group = RowGroup(group=topology.cp_group, shard=topology.row_shard)
        if isinstance(core, SdpaAttention) and core.sees_window:
            core.window = model.sliding_window


def _find_embedding_scale(model: ModelConfig, dtype: torch.dtype) -> float:
    """Gemma's is rounded to the model's dtype, as transformers rounds it, and Granite's is not."""
    if model.architecture.scaled_embedding:
        return torch.tensor(model.hidden_size**0.5, dtype=dtype).item()
    return model.embedding_multiplier


def _scale(_module: torch.nn.Module, _inputs: object, output: torch.Tensor, scale: float) -> torch.Tensor:
    return output * scale


def _require_grad(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    """A pipeline's backward starts from each stage's output, so the first stage's must have a graph behind it."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output


def _build_block_spec(model: ModelConfig, topology: Topology) -> TransformerBlockSubmodules:
    layers = list_stage_layers(model, topology.pp_rank, topology.pp_size)
    specs = [_build_layer_spec(model, layer) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=find_norm(model))


def _build_layer_spec(model: ModelConfig, number: int) -> ModuleSpec:
    spec, architecture = get_gpt_layer_local_spec(), model.architecture
    spec.module = Layer
    if model.has_parallel_residual:
        spec.module = ParallelLayer
    elif architecture.output_norms:
        spec.module = NormedLayer
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    mlp = layer.mlp.submodules
    norm = find_norm(model)
    layer.input_layernorm = layer.pre_mlp_layernorm = norm if architecture.input_norms else IdentityOp
    attention.core_attention = SinkAttention if architecture.attention_sinks else SdpaAttention
    attention.linear_qkv = mlp.linear_fc1 = LoraColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = LoraRowParallelLinear
    if model.has_experts(number):
        layer.mlp = ExpertMlp
    elif architecture.gated:
        mlp.activation_func = GeGlu if architecture.gate_activation == "gelu_tanh" else SwiGlu
    if model.has_delta_net(number):
        layer.self_attention = ModuleSpec(module=GatedDeltaNet)
    elif architecture.latent_attention:
        layer.self_attention = ModuleSpec(module=LatentAttention)
    elif architecture.rotary:
        layer.self_attention.module = WholeNormedSelfAttention if architecture.whole_qk_norm else RotarySelfAttention
    if model.has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec
