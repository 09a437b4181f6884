"""config.json of DeepSeek-V3, Kimi K2 and Moonlight, as published and as written here, against those in conf/model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432},
    **{"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512},
    **{"q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8},
    **{"topk_method": "noaux_tc", "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "rms_norm_eps": 1e-6},
    **{"first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    **{"max_position_embeddings": 163840, "rope_theta": 10000, "tie_word_embeddings": False, "attention_bias": False},
    "rope_scaling": {
        **{"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": FP8,
}
"""As published, with the keys that the models' own code has."""
KIMI_K2 = DEEPSEEK_V3 | {
    **{"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 163840, "n_group": 1},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "topk_group": 1},
    **{"routed_scaling_factor": 2.827, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    **{"max_position_embeddings": 131072, "rope_theta": 50000.0, "seq_aux": True, "aux_loss_alpha": 0.001},
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
}
MOONLIGHT = DEEPSEEK_V3 | {
    **{"vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408},
    **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2},
    **{"n_routed_experts": 64, "routed_scaling_factor": 2.446, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    **{"num_experts_per_tok": 6, "first_k_dense_replace": 1, "max_position_embeddings": 8192, "rope_theta": 50000.0},
    **{"rms_norm_eps": 1e-5, "rope_scaling": None, "num_nextn_predict_layers": 0, "quantization_config": None},
}


@pytest.mark.parametrize(
    ("name", "published", "billions"),
    [("deepseek_v3", DEEPSEEK_V3, 671.03), ("kimi_k2", KIMI_K2, 1026.41), ("moonlight_16b_a3b", MOONLIGHT, 15.96)],
    ids=["v3", "kimi_k2", "moonlight"],
)
def test_a_deepseek_of_this_projects_is_the_published_one(
    name: str, published: dict, billions: float, tmp_path: Path
) -> None:
    model = compose_config([f"model={name}", "data=fake"]).model
    described = HF_FAMILIES["deepseek_v3"].describe(model)
    for config in (published, described):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = ModelConfig(**read_model_fields(tmp_path))
        assert replace(read, name=name, checkpoint=None) == replace(model, num_kv_heads=model.num_heads)
        theirs = DeepseekV3Config(**config)
        scale = DeepseekV3Attention(reduce(theirs), 0).scaling
        assert scale == pytest.approx(model.attention_scale or model.head_dim**-0.5, rel=1e-12)
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=0.005)


def reduce(config: DeepseekV3Config) -> DeepseekV3Config:
    """With linears that take no memory to speak of."""
    config.hidden_size = config.num_attention_heads = config.kv_lora_rank = 1
    return config
