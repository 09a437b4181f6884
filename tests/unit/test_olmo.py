"""config.json of OLMo 2 and OLMo 3, as published and as written here, against those in conf/model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.mcore.rotary import Rotary

OLMO2 = {
    **{"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02},
    **{"intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32},
    **{"num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None},
    **{"rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352},
}
YARN = {
    **{"rope_type": "yarn", "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0},
    "original_max_position_embeddings": 8192,
}
KINDS = ["full_attention" if layer % 4 == 3 else "sliding_attention" for layer in range(32)]
OLMO3 = OLMO2 | {
    **{"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "vocab_size": 100278, "rope_scaling": YARN},
    **{"max_position_embeddings": 65536, "sliding_window": 4096, "layer_types": KINDS},
}


def read(config: dict, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(**read_model_fields(directory))


@pytest.mark.parametrize(
    ("name", "published", "count"), [("olmo2_7b", OLMO2, 7298617344), ("olmo3_7b", OLMO3, 7298011136)]
)
def test_an_olmo_of_this_project_is_the_published_one(name: str, published: dict, count: int, tmp_path: Path) -> None:
    model = compose_config([f"model={name}", "data=fake"]).model
    for config in (published, HF_FAMILIES[model.family].describe(model)):
        found = replace(read(config, tmp_path), name=name, checkpoint=None)
        assert found == replace(model, num_kv_heads=32, head_size=128)
    assert count_parameters(model) == count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": None},
        {"rope_scaling": None},
        {"rope_theta": None, "rope_scaling": None},
        {"rope_scaling": None, "rope_parameters": {"full_attention": YARN | {"rope_theta": 7.0}}},
        {
            "rope_scaling": None,
            "rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 9.0}},
        },
    ],
    ids=str,
)
def test_an_olmo_3_turns_what_transformers_turns(changes: dict, tmp_path: Path) -> None:
    config = {key: value for key, value in (OLMO3 | changes).items() if value is not None}
    model, theirs = read(config, tmp_path), Olmo3RotaryEmbedding(Olmo3Config(**json.loads(json.dumps(config))))
    assert [model.sees_window(layer) for layer in range(32)] == [kind == "sliding_attention" for kind in KINDS]
    positions_BS = torch.arange(0, 4000, 200).view(2, 10)
    ours = Rotary(model, torch.float32, torch.device("cpu")).compute_angles(positions_BS)
    for angles, kind in zip(ours, ("full_attention", "sliding_attention"), strict=True):
        for own_SB1F, cos_BSD in zip(angles.of_keys, theirs(torch.empty(0), positions_BS, kind), strict=True):
            expected_SBF = cos_BSD[..., : own_SB1F.shape[-1]].transpose(0, 1)
            torch.testing.assert_close(own_SB1F[:, :, 0], expected_SBF, rtol=1e-4, atol=1e-3)


def test_one_rule_for_all_layers_is_read_where_it_scales_nothing(tmp_path: Path) -> None:
    """As transformers 5.8 saved models; 5.17 no longer reads it."""
    plain = OLMO3 | {"rope_scaling": None}
    flat = plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert read(flat, tmp_path) == read(plain, tmp_path)
