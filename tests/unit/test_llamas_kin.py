"""config.json of families that differ from Llama in little, as published and as written here, against conf/model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SmolLM3Config

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.mcore.rotary import Rotary

SMOLLM3 = {
    **{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048},
    **{"initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36},
    **{"max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3"},
    **{"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16},
    **{"num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16"},
    **{"use_cache": False, "use_sliding_window": False, "vocab_size": 128256},
}

GRANITE = {
    **{"architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0},
    **{"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800},
    **{"logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite"},
    **{"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0},
    **{"residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0},
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49159},
}
SEED_OSS = {
    **{"architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1},
    **{"attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27648, "mlp_bias": False},
    **{"max_position_embeddings": 524288, "model_type": "seed_oss", "num_attention_heads": 80},
    **{"num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 1, "residual_dropout": 0.1},
    **{"rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 155136},
}
MINISTRAL3 = {
    **{"architectures": ["Ministral3ForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "model_type": "ministral3"},
    **{"max_position_embeddings": 262144, "num_attention_heads": 32, "num_hidden_layers": 34},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "sliding_window": None, "tie_word_embeddings": False},
    **{"use_cache": True, "vocab_size": 131072},
    "rope_parameters": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
        **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0},
        **{"rope_type": "yarn", "type": "yarn"},
    },
}


def read(config: dict, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(**read_model_fields(directory))


PUBLISHED = {
    "seed_oss_36b": (SEED_OSS, 36151104512),
    "ministral3_8b": (MINISTRAL3, 8489553920),
    "granite3_3_8b": (GRANITE, 8170864640),
    "smollm3_3b": (SMOLLM3, 3075098624),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_of_this_project_is_the_published_one(name: str, tmp_path: Path) -> None:
    published, count = PUBLISHED[name]
    model = compose_config([f"model={name}", "data=fake"]).model
    for config in (published, HF_FAMILIES[model.family].describe(model)):
        dropouts = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # a run has them where it asks for them
        found = replace(read(config, tmp_path), name=name, checkpoint=None, **dropouts)
        assert found == replace(model, head_size=found.head_size)
        assert found.head_dim == model.head_dim
    assert count_parameters(model) == count


def test_a_seed_oss_reads_its_dropouts_and_has_none_on_the_embedding(tmp_path: Path) -> None:
    model = read(SEED_OSS, tmp_path)
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.1)
    assert not model.architecture.drops_embedding


def test_queries_grow_with_the_contexts_before_them(tmp_path: Path) -> None:
    model = read(MINISTRAL3, tmp_path)
    positions_BS = torch.tensor([[0, 5, 16383, 16384, 40000, 262143]])
    (full, windowed) = Rotary(model, torch.float64, torch.device("cpu")).compute_angles(positions_BS)
    assert full is windowed
    growth_S = 1 + 0.1 * torch.tensor([1, 1, 1, 2, 3, 16], dtype=torch.float64).log()
    for of_queries, of_keys in zip(full.of_queries, full.of_keys, strict=True):
        torch.testing.assert_close(of_queries, of_keys * growth_S[:, None, None, None], rtol=1e-6, atol=1e-6)


def test_a_ministral_without_a_rule_has_the_one_of_transformers(tmp_path: Path) -> None:
    whole = read(MINISTRAL3, tmp_path)
    gone = ("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps")
    assert read({key: value for key, value in MINISTRAL3.items() if key not in gone}, tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "unturned"),
    [
        ({}, list(range(3, 36, 4))),
        ({"no_rope_layers": None}, list(range(3, 36, 4))),
        ({"no_rope_layers": None, "no_rope_layer_interval": 12}, [11, 23, 35]),
        ({"no_rope_layers": [1] * 36}, []),
        ({"no_rope_layers": [0] * 40}, list(range(36))),
    ],
)
def test_layers_without_rotation_are_those_of_transformers(changes: dict, unturned: list[int], tmp_path: Path) -> None:
    model, theirs = read(SMOLLM3 | changes, tmp_path), SmolLM3Config(**SMOLLM3 | changes)
    assert model.unturned_layers == unturned == [layer for layer in range(36) if not theirs.no_rope_layers[layer]]


@pytest.mark.parametrize("listed", [False, True])
def test_a_window_is_on_the_layers_that_transformers_puts_it_on(listed: bool, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 18 if listed else None
    config = SMOLLM3 | {"use_sliding_window": True, "sliding_window": 512, "layer_types": kinds}
    model, theirs = read(config, tmp_path), SmolLM3Config(**config).layer_types
    assert [model.sees_window(layer) for layer in range(36)] == [kind == "sliding_attention" for kind in theirs]
