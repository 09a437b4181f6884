"""Checkpoints of models that see pictures, before anything starts: config.json as published, names, what is refused."""

import json
from pathlib import Path

import pytest
from family_toy import edit_family_config, read_family_config
from hf_toy import build_run_config
from safetensors.torch import load_file, save_file
from wrapper_toy import edit_text_config, rename_tensors, write_wrapper

from lora_dist.base_shapes import count_parameters
from lora_dist.bench.runner import check_bench
from lora_dist.config import BenchConfig, ModelConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, read_model_fields

GEMMA = {"model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
MISTRAL = {
    **{"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "model_type": "mistral"},
    **{"initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072, "vocab_size": 131072},
    **{"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05},
    **{"rope_theta": 1e9, "sliding_window": None, "use_cache": True},
}
PUBLISHED = {
    "gemma-3-4b": (
        "gemma3",
        {**GEMMA, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        4_300_079_472,
    ),
    "gemma-3-12b": (
        "gemma3",
        {
            **{**GEMMA, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48},
            **{"num_attention_heads": 16, "num_key_value_heads": 8},
        },
        12_187_325_040,
    ),
    "gemma-3-27b": (
        "gemma3",
        {
            **{**GEMMA, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168},
        },
        27_432_406_640,
    ),
    "mistral-small-3.1": ("mistral3", MISTRAL, 23_572_403_200),
}
"""model_type and text_config as published, and parameters: Gemma's of the whole, Mistral's of the text model."""
SIGLIP, SIGLIP_SIZE = 416_866_032, 1152
"""Parameters of the tower that every Gemma 3 has, and its features."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_configs_are_whole_models(name: str, tmp_path: Path) -> None:
    model_type, text, num_parameters = PUBLISHED[name]
    config = {"model_type": model_type, "text_config": text, "vision_config": {}, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(**read_model_fields(tmp_path))
    assert model.wrapper == model_type
    if model_type == "gemma3":
        num_parameters -= SIGLIP + SIGLIP_SIZE * (model.hidden_size + 1)
    assert count_parameters(model) == num_parameters


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), ("gone", False), ("gone", "gone")])
def test_a_stored_head_is_not_tied_whatever_one_level_says(outer: object, inner: object, tmp_path: Path) -> None:
    """As transformers has it, which reads the outer level, true where it is not written, and compares the values."""
    write_wrapper("mistral3", tmp_path)
    edit_family_config(tmp_path, tie_word_embeddings=outer)
    edit_text_config(tmp_path, tie_word_embeddings=inner)
    assert not read_family_config(tmp_path).tied_output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type='llava' is not supported, only"),
        ({"text_config": None}, "text_config=None of a gemma3 is no JSON object"),
        ({"text_config": {"model_type": "gemma2"}}, "model_type='gemma3' is not that of a model around a 'gemma2'"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "gemma2"}},
            "text_config.model_type='gemma2' is not supported, only",
        ),
    ],
)
def test_what_holds_no_known_text_model_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    write_wrapper("gemma3", tmp_path)
    edit_family_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_model_fields(tmp_path)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    model = write_wrapper("gemma3", tmp_path)
    path, key = tmp_path / "model.safetensors", "language_model.model.layers.1.mlp.up_proj.weight"
    whole = load_file(path)
    save_file({name: one for name, one in whole.items() if name != key}, path)
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        check_hf_checkpoint(model, tmp_path)
    save_file(whole, path)
    rename_tensors(tmp_path, {"language_model.model.": "words."})
    with pytest.raises(ValueError, match=r"holds no text model, whose tensors begin with language_model\.model\. or"):
        check_hf_checkpoint(model, tmp_path)


def test_a_wrapper_is_of_its_checkpoint(tmp_path: Path) -> None:
    model = write_wrapper("gemma3", tmp_path)
    model.wrapper = None
    with pytest.raises(ValueError, match=r"model\.wrapper=None but .*config\.json has gemma3"):
        check_hf_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"model\.wrapper=gemma3 is of a model\.checkpoint"):
        ModelConfig(**read_model_fields(tmp_path) | {"checkpoint": None})


def test_bench_refuses_its_peers(tmp_path: Path) -> None:
    config = build_run_config(write_wrapper("gemma3", tmp_path), bench=BenchConfig(contenders=["lora", "peft"]))
    with pytest.raises(ValueError, match="is a gemma3, whose text model is trained here alone; bench"):
        check_bench(config)
