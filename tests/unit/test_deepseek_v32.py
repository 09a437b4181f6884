"""config.json of DeepSeek-V3.2 and GLM-5, as published and as written here, against those in conf/model."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from test_deepseek_v3 import DEEPSEEK_V3, FP8
from transformers import AutoConfig, AutoModelForCausalLM

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES

INDEXER = {"index_topk": 2048, "index_head_dim": 128}
DEEPSEEK_V32 = DEEPSEEK_V3 | INDEXER | {"model_type": "deepseek_v32", "index_n_heads": 64}
GLM5 = {
    **INDEXER,
    **{"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "vocab_size": 154880},
    **{"hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048, "num_hidden_layers": 78},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "n_shared_experts": 1, "n_routed_experts": 256},
    **{"routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 2048, "qk_rope_head_dim": 64, "ep_size": 1},
    **{"v_head_dim": 256, "qk_nope_head_dim": 192, "qk_head_dim": 256, "head_dim": 64, "n_group": 1, "topk_group": 1},
    **{"topk_method": "noaux_tc", "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3},
    **{"norm_topk_prob": True, "scoring_func": "sigmoid", "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 202752, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
    **{"tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "index_n_heads": 32},
    **{"rope_interleave": True, "indexer_rope_interleave": True, "quantization_config": FP8},
}
GLM52 = GLM5 | {
    **{"max_position_embeddings": 1048576, "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}},
    **{"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None},
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
}


def read(config: dict, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(**read_model_fields(directory))


@pytest.mark.parametrize(
    ("name", "published", "billions", "of_indexers"),
    [("deepseek_v3_2", DEEPSEEK_V32, 671.03, 0.85), ("glm5", GLM5, 743.18, 0.73)],
    ids=["deepseek_v32", "glm5"],
)
def test_a_model_of_this_projects_is_the_published_one(
    name: str, published: dict, billions: float, of_indexers: float, tmp_path: Path
) -> None:
    model = compose_config([f"model={name}", "data=fake"]).model
    family = HF_FAMILIES[model.family]
    for config in (published, family.describe(model)):
        assert replace(read(config, tmp_path), name=name, checkpoint=None) == replace(
            model, num_kv_heads=model.num_heads
        )
    num_carried = sum(prod(shape) for shape in family.compute_carried(model).values())
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=0.005)
    assert num_carried / 1e9 == pytest.approx(of_indexers, abs=0.005)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.describe(model)))
    assert count_parameters(model) + num_carried == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    "sharing",
    [
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FFF" + "SSSF" * 18 + "SSS"},
        {"indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3},
        {},
        {"index_topk_freq": 3},
    ],
    ids=["period", "pattern", "types", "none", "from the second"],
)
def test_layers_share_indexers_as_transformers_has_it(sharing: dict, tmp_path: Path) -> None:
    kept = {key: value for key, value in GLM52.items() if not key.startswith("index_topk_") and key[-6:] != "offset"}
    config = kept | sharing
    model = read(config, tmp_path)
    theirs = AutoConfig.for_model(**config).indexer_types
    assert model.layers_without_indexer == [layer for layer, kind in enumerate(theirs) if kind == "shared"]
    assert read(HF_FAMILIES["glm_moe_dsa"].describe(model), tmp_path) == model
    if len(sharing) == 2 or "index_topk_freq" not in sharing:
        assert len(model.layers_without_indexer) == (57 if sharing else 0)
