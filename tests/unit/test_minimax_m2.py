"""config.json of MiniMax-M2, as published and as written here, against the one in conf/model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.mcore.rotary import compute_frequencies

FP8 = {
    **{"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
PUBLISHED = {
    **{"model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62},
    **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536, "vocab_size": 200064},
    **{"max_position_embeddings": 196608, "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62},
    **{"num_key_value_heads": 8, "num_local_experts": 256, "rms_norm_eps": 1e-06, "rope_theta": 5000000},
    **{"mtp_transformer_layers": 1, "num_mtp_modules": 3, "use_mtp": True, "rotary_dim": 64, "scoring_func": "sigmoid"},
    **{"qk_norm_type": "per_layer", "use_qk_norm": True, "use_routing_bias": True, "shared_intermediate_size": 0},
    **{"tie_word_embeddings": False, "transformers_version": "4.46.1", "use_cache": True, "quantization_config": FP8},
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
}
"""With the keys that the model's own code has."""
ABSENT = ("num_local_experts", "num_experts_per_tok", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")

knows_rotary_dim = pytest.mark.skipif(
    "convert_rope_params_to_dict" not in vars(MiniMaxM2Config), reason="this transformers turns whole heads"
)


def read(config: dict, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return replace(ModelConfig(**read_model_fields(directory)), name="minimax_m2", checkpoint=None)


@knows_rotary_dim
def test_the_minimax_of_this_project_is_the_published_one(tmp_path: Path) -> None:
    model = compose_config(["model=minimax_m2", "data=fake"]).model
    left_out = {key: value for key, value in PUBLISHED.items() if key not in ABSENT}
    for config in (PUBLISHED, left_out, HF_FAMILIES["minimax_m2"].describe(model)):
        assert read(config, tmp_path) == model
        theirs = MiniMaxM2RotaryEmbedding(MiniMaxM2Config(**config))
        torch.testing.assert_close(compute_frequencies(model), theirs.inv_freq, rtol=1e-6, atol=0)
    assert count_parameters(model) / 1e9 == pytest.approx(228.69, abs=0.005)


@knows_rotary_dim
@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 32},
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.125}},
    ],
    ids=str,
)
def test_what_positions_turn_is_what_transformers_turns(changes: dict, tmp_path: Path) -> None:
    config = PUBLISHED | changes
    theirs = MiniMaxM2RotaryEmbedding(MiniMaxM2Config(**config))
    torch.testing.assert_close(compute_frequencies(read(config, tmp_path)), theirs.inv_freq, rtol=1e-6, atol=0)
