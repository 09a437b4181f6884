"""gpt-oss' config.json, as published and as written here, against the shapes in conf/model; what cannot train."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.mcore.rotary import compute_frequencies

GPT_OSS_20B = {
    **{"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64},
    **{"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32},
    **{"num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128, "swiglu_limit": 7.0},
    **{"max_position_embeddings": 131072, "initial_context_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 150000},
    **{"attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "output_router_logits": False},
    **{"router_aux_loss_coef": 0.9, "tie_word_embeddings": False, "initializer_range": 0.02},
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "original_max_position_embeddings": 4096,
    },
}
"""As published, but for layer_types, which say what is usual, and the experts' quantization_config."""
GPT_OSS_120B = GPT_OSS_20B | {"num_hidden_layers": 36, "num_local_experts": 128}


@pytest.mark.parametrize(
    ("name", "published", "billions"),
    [("gpt_oss_20b", GPT_OSS_20B, 20.91), ("gpt_oss_120b", GPT_OSS_120B, 116.83)],
    ids=["20b", "120b"],
)
def test_a_gpt_oss_of_this_projects_is_the_published_one(
    name: str, published: dict, billions: float, tmp_path: Path
) -> None:
    model = compose_config([f"model={name}", "data=fake"]).model
    described = HF_FAMILIES["gpt_oss"].describe(model)
    listed = published | {"layer_types": ["sliding_attention", "full_attention"] * (model.num_layers // 2)}
    unsaid = {key: value for key, value in published.items() if not key.startswith(("rope", "sliding", "swiglu"))}
    for config in (published, listed, described, unsaid):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert replace(ModelConfig(**read_model_fields(tmp_path)), name=name, checkpoint=None) == model
    theirs = GptOssRotaryEmbedding(GptOssConfig(**published))
    torch.testing.assert_close(compute_frequencies(model), theirs.inv_freq, rtol=1e-5, atol=0)
    assert model.rope_scaling["attention_factor"] == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=0.005)


def test_windows_that_no_layer_has_are_none(tmp_path: Path) -> None:
    for changes in ({"layer_types": ["full_attention"] * 24}, {"sliding_window": None}):
        (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B | changes))
        model = ModelConfig(**read_model_fields(tmp_path))
        assert (model.sliding_window, model.full_attention_layers) == (None, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.bias=all", "lora.bias=all trains every bias, but those of the experts of model.family=gpt_oss"),
        ("method=bitfit", "method=bitfit trains every bias, but those of the experts of model.family=gpt_oss"),
        ("lora.init=pissa", "gate_proj is a linear of experts, whose adapters want lora.init=gaussian"),
        ("model.swiglu_alpha=null", "model.family=gpt_oss needs a positive model.swiglu_alpha"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    from lora_dist.cli.inputs import check_inputs

    words = ["model=gpt_oss_20b", "data=fake", "lora.target_modules=[all,gate_proj]", override]
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        check_inputs(compose_config(words), 1, ["lora"])
    assert message in str(refusal.value)


def test_it_can_be_tried_on_a_cpu() -> None:
    """With the layers that are left, of which every second one has no window."""
    model = compose_config(["model=gpt_oss_120b", "debug=shrink"]).model
    assert (model.num_layers, model.num_experts, model.full_attention_layers) == (4, 4, [1, 3])
