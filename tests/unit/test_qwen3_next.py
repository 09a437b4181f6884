"""config.json of Qwen3-Next and Qwen3.5, as published and as written here, against those in conf/model; targets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from family_toy import write_family_checkpoint
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from lora_dist.base_shapes import count_parameters
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.lora.targets import build_adapter_specs

PUBLISHED = {
    **{"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "attention_dropout": 0.0},
    **{"decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": []},
    **{"moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512},
    **{"num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False},
    **{"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000},
    **{"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
}


def test_a_qwen3_next_of_this_projects_is_the_published_one(tmp_path: Path) -> None:
    model = compose_config(["model=qwen3_next_80b_a3b", "data=fake"]).model
    for config in (PUBLISHED, HF_FAMILIES["qwen3_next"].describe(model)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = ModelConfig(**read_model_fields(tmp_path))
        assert replace(read, name=model.name, checkpoint=None) == model
        theirs = Qwen3NextConfig(**config)
        kinds = ["linear_attention" if model.has_delta_net(n) else "full_attention" for n in range(model.num_layers)]
        assert theirs.layer_types == kinds
        assert theirs.rope_parameters["partial_rotary_factor"] == model.rotary_fraction
    assert count_parameters(model) / 1e9 == pytest.approx(79.67, abs=0.005)


TRANSFORMERS = {
    "qwen3_next": Qwen3NextConfig,
    "qwen3_5_text": Qwen3_5TextConfig,
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig,
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_what_config_json_leaves_out_is_as_transformers_has_it(family: str, tmp_path: Path) -> None:
    sizes = {"model_type": family, "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 16, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    read, theirs = ModelConfig(**read_model_fields(tmp_path)), TRANSFORMERS[family](**sizes)
    assert read.family == family
    for key, value in HF_FAMILIES[family].describe(read).items():
        if key != "rope_parameters" and (key != "intermediate_size" or family == "qwen3_5_text"):
            assert getattr(theirs, key) == value, key
    assert read.rotary_fraction == 0.25


@pytest.mark.parametrize(
    ("name", "family", "billions"),
    [("qwen3_5_9b", "qwen3_5_text", 8.95), ("qwen3_5_35b_a3b", "qwen3_5_moe_text", 34.66)],
)
def test_a_qwen3_5_of_this_projects_is_transformers_default(
    name: str, family: str, billions: float, tmp_path: Path
) -> None:
    """But for the context and the rotary base, which are longer and larger in what is published."""
    model, theirs = compose_config([f"model={name}", "data=fake"]).model, TRANSFORMERS[family]()
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    published = {"max_position_embeddings": 262144, "rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict() | published))
    read = ModelConfig(**read_model_fields(tmp_path))
    assert replace(read, name=name, checkpoint=None) == model
    assert count_parameters(model) / 1e9 == pytest.approx(billions, abs=0.005)


def test_layers_that_predict_a_second_token_are_left_out(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_next", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {f"mtp.{name}": tensors["model.norm.weight"].clone() for name in ("norm.weight", "layers.0.mlp.gate.weight")}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    check_hf_checkpoint(model, tmp_path)


def test_all_is_what_every_token_passes(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_next", tmp_path)
    targets = {(spec.layer, spec.target) for spec in build_adapter_specs(LoraConfig(target_modules=["all"]), model)}
    shared = {"shared_gate_proj", "shared_up_proj", "shared_down_proj"}
    assert {target for layer, target in targets if layer == 0} == {"in_proj_qkvz", "in_proj_ba", "out_proj"} | shared
    assert {target for layer, target in targets if layer == 1} == {"q_proj", "k_proj", "v_proj", "o_proj"} | shared
    (tmp_path / "other").mkdir()
    model = write_family_checkpoint("qwen3_5_text", tmp_path / "other")
    found = build_adapter_specs(LoraConfig(target_modules=["all"], layers=["0"]), model)
    inputs = {f"in_proj_{part}" for part in "qkvzba"}
    assert {spec.target for spec in found} == inputs | {"out_proj", "gate_proj", "up_proj", "down_proj"}


def test_out_proj_is_a_delta_nets_where_there_are_some(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_next", tmp_path)
    for words in (["out_proj"], ["linear_attn.out_proj"]):
        found = build_adapter_specs(LoraConfig(target_modules=words), model)
        assert {(spec.layer, spec.target) for spec in found} == {(0, "out_proj"), (2, "out_proj")}


def test_out_proj_is_o_proj_elsewhere(tmp_path: Path) -> None:
    model = write_family_checkpoint("opt", tmp_path)
    found = build_adapter_specs(LoraConfig(target_modules=["out_proj"]), model)
    assert {spec.target for spec in found} == {"o_proj"}


def test_a_shrunken_one_keeps_both_kinds_of_layers() -> None:
    model = compose_config(["model=qwen3_next_80b_a3b", "debug=shrink"]).model
    assert [model.has_delta_net(layer) for layer in range(model.num_layers)] == [True, True, True, False]
    assert model.delta_sizes.values_per_key == 2
