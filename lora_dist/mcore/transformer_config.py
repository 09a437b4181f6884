"""What Megatron is told of a model and its shards."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.config import ModelConfig
from lora_dist.topology import Topology

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def build_transformer_config(model: ModelConfig, topology: Topology, dtype: torch.dtype) -> TransformerConfig:
    """With `model` on it, since Megatron hands its configuration to each module it makes."""
    architecture = model.architecture
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=max(model.num_query_groups, topology.tp_size),  # each rank a head, if one that others have too
        kv_channels=model.head_dim,
        ffn_hidden_size=model.find_mlp_size(0),  # of Megatron's own MLP, which layers without experts have
        layernorm_epsilon=model.layernorm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        softmax_scale=model.attention_scale,
        normalization="RMSNorm" if architecture.rms_norm else "LayerNorm",
        qk_layernorm=model.has_qk_norm,
        attention_output_gate=architecture.gated_attention,
        add_bias_linear=architecture.linear_biases,
        add_qkv_bias=architecture.qkv_biases,
        gated_linear_unit=architecture.gated,
        activation_func=F.silu if architecture.gated else _ACTIVATIONS[model.mlp_activation],
        use_te_activation_func=architecture.gated,  # that is: a module, e.g. SwiGlu, in place of Megatron's own gate
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        sequence_parallel=topology.sequence_parallel,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=topology.device.type == "cuda",
        deallocate_pipeline_outputs=True,
    )
    config.model = model
    return config
