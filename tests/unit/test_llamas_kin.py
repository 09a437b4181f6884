"""config.json of families that differ from Llama in little, as published and as written here, against conf/model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import SmolLM3Config

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES

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


def read(config: dict, directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(**read_model_fields(directory))


PUBLISHED = {
    "smollm3_3b": (SMOLLM3, 3075098624),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_of_this_project_is_the_published_one(name: str, tmp_path: Path) -> None:
    published, count = PUBLISHED[name]
    model = compose_config([f"model={name}", "data=fake"]).model
    for config in (published, HF_FAMILIES[model.family].describe(model)):
        found = replace(read(config, tmp_path), name=name, checkpoint=None)
        assert found == replace(model, head_size=found.head_size)
        assert found.head_dim == model.head_dim
    assert count_parameters(model) == count


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
