"""What a family's configuration may say, its names, and its angles."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, ONE_EACH
from family_toy import (
    build_family_model,
    edit_family_config,
    name_as_stored,
    read_family_config,
    write_family_checkpoint,
)
from transformers import AutoConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint, read_model_fields
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.modules import FAMILY_NAMES, find_stored_rows
from lora_dist.files.peft_experts import TARGETS as PEFT_TARGETS
from lora_dist.files.peft_experts import ExpertParameter, find_rows
from lora_dist.lora.spec import CANONICAL_TARGETS
from lora_dist.lora.targets import compute_linear_shapes, find_num_experts
from lora_dist.mcore.rotary import Rotary, compute_frequencies


@pytest.mark.parametrize("name", FAMILIES)
def test_every_canonical_parameter_is_a_stored_one(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    family = HF_FAMILIES[model.family]
    shapes = family.compute_shapes(model) | family.compute_carried(model)
    theirs = name_as_stored(build_family_model(name).state_dict(), model)
    if model.tied_output:
        del theirs["lm_head.weight"]
    mine = {f"{family.find_module(key)}.{key.rpartition('.')[2]}": shape for key, shape in shapes.items()}
    assert mine == {key: tuple(parameter.shape) for key, parameter in theirs.items()}


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_target_is_a_linear_of_transformers(name: str, tmp_path: Path) -> None:
    model, theirs = write_family_checkpoint(name, tmp_path), build_family_model(name)
    names, found = FAMILY_NAMES[model.family], set[str]()
    for layer in range(model.num_layers):
        for target, (in_features, out_features) in compute_linear_shapes(model, layer).items():
            if find_num_experts(target, model, layer) is not None:
                continue
            found.add(target)
            linear = theirs.get_submodule(names[target].format(layer=layer))
            stored_rows = find_stored_rows(target, model, layer)
            assert len(stored_rows[target]) == out_features
            assert (linear.in_features, linear.out_features) == (in_features, sum(map(len, stored_rows.values())))
    if model.architecture.latent_attention:
        found.add("q_proj")  # of its models without a latent for queries
    assert list(names) == [target for target in CANONICAL_TARGETS if target in found]


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "glm4_moe", "minimax_m2", "deepseek_v3", "glm_moe_dsa", "gpt_oss"]
)
def test_every_target_of_experts_is_in_a_parameter_of_transformers(name: str, tmp_path: Path) -> None:
    model, theirs = write_family_checkpoint(name, tmp_path), build_family_model(name)
    for parameter, targets in PEFT_TARGETS.items():
        (in_features,) = {compute_linear_shapes(model, 2)[target][0] for target in targets}
        num_rows = sum(len(rows) for rows in find_rows(ExpertParameter(2, parameter), model).values())
        stacked = theirs.get_parameter(ExpertParameter(2, parameter).full_name)
        matrix = (in_features, num_rows) if name == "gpt_oss" else (num_rows, in_features)
        assert stacked.shape == (find_num_experts(targets[0], model, 2), *matrix)


def test_older_configurations_say_the_same(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, at first with `type`."""
    model = write_family_checkpoint("llama", tmp_path)
    scaling = {"rope_type": "llama3", **model.rope_scaling}
    edit_family_config(tmp_path, rope_parameters="gone", rope_theta=100.0, rope_scaling=scaling, head_dim="gone")
    assert read_family_config(tmp_path) == model
    edit_family_config(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, num_key_value_heads=None)
    fields = read_model_fields(tmp_path)
    assert (fields["rope_scaling"], fields["num_kv_heads"]) == ({"factor": 2.0}, 8)


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("qwen3", {"rope_type": "yarn", "factor": 2.0}),
        ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
        ("smollm3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("olmo3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ],
)
def test_a_second_rotary_rule_is_refused(name: str, scaling: dict, tmp_path: Path) -> None:
    """As model cards say to put one in, beside what transformers 5 saved; transformers itself takes the second."""
    write_family_checkpoint(name, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    edit_family_config(tmp_path, rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"move what is meant into rope_parameters and leave rope_scaling") as refusal:
        read_model_fields(tmp_path)
    assert f"rope_parameters={saved.get('full_attention', saved)} and rope_scaling={scaling} are" in str(refusal.value)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "phi3_long", "gemma3_text", "olmo3"])
def test_a_rotary_rule_may_be_there_twice(name: str, tmp_path: Path) -> None:
    """In the words of transformers 4 beside what transformers 5 made of them."""
    model = write_family_checkpoint(name, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    older = dict(saved.get("full_attention", saved))
    older["type"] = older.pop("rope_type")
    theta = older.pop("rope_theta")
    edit_family_config(tmp_path, rope_scaling=older, rope_theta="gone" if name == "gemma3_text" else theta)
    assert read_family_config(tmp_path) == model


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_configuration_leaves_out_is_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    left_out = ("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "tie_word_embeddings")
    edit_family_config(
        tmp_path, num_attention_heads=32, hidden_size=128, **dict.fromkeys((*left_out, "rope_parameters"), "gone")
    )
    model, theirs = read_family_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert model.num_query_groups == theirs.num_key_value_heads
    assert model.head_dim == getattr(theirs, "head_dim", 4)
    assert model.sliding_window == (theirs.sliding_window if name == "mistral" else None)
    assert (model.layernorm_epsilon, model.tied_output) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]


def test_qwens_windows_are_read(tmp_path: Path) -> None:
    write_family_checkpoint("qwen2", tmp_path)
    edit_family_config(tmp_path, use_sliding_window=True, sliding_window=5, max_window_layers=3, layer_types="gone")
    assert read_family_config(tmp_path).full_attention_layers == [0, 1, 2]
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert [kind == "full_attention" for kind in theirs.layer_types] == [True, True, True, False]
    edit_family_config(tmp_path, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2)
    model = read_family_config(tmp_path)
    assert (model.sliding_window, model.full_attention_layers) == (5, [2, 3])
    edit_family_config(tmp_path, layer_types=["full_attention"] * 4)
    assert read_family_config(tmp_path).sliding_window is None


def test_a_mistral_may_list_its_layers(tmp_path: Path) -> None:
    """transformers makes it a Ministral; without a list every layer has the window."""
    model = write_family_checkpoint("mistral_listed", tmp_path)
    assert (model.sliding_window, model.full_attention_layers) == (5, [1, 2])
    for full_layers in ([], [1, 2]):
        described = HF_FAMILIES["mistral"].describe(replace(model, full_attention_layers=full_layers))
        (tmp_path / "config.json").write_text(json.dumps(described))
        assert read_family_config(tmp_path).full_attention_layers == full_layers
        assert AutoConfig.from_pretrained(tmp_path).model_type == ("ministral" if full_layers else "mistral")
    edit_family_config(tmp_path, layer_types=["full_attention"] * 4)
    assert read_family_config(tmp_path).sliding_window is None
    edit_family_config(tmp_path, layer_types=["chunked_attention"] * 4)
    with pytest.raises(ValueError, match="layer_types is not a list of 4 times full_attention or sliding_attention"):
        read_family_config(tmp_path)


def test_experts_that_transformers_4_wrote_are_read(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_moe", tmp_path)
    edit_family_config(tmp_path, num_local_experts="gone", num_experts=6, mlp_only_layers=None)
    assert read_family_config(tmp_path) == model


def test_gemmas_layers_are_read(tmp_path: Path) -> None:
    """As transformers 5 writes them, and as google's files had them before."""
    model = write_family_checkpoint("gemma3_text", tmp_path)
    assert (model.full_attention_layers, model.rope_theta, model.local_rope_theta) == ([2], 500.0, 9.0)
    assert (model.rope_scaling, model.attention_scale) == ({"factor": 2.0}, pytest.approx(6**-0.5))
    older = {"layer_types": "gone", "sliding_window_pattern": 3, "rope_parameters": "gone", "rope_theta": 500.0}
    edit_family_config(tmp_path, **older, rope_local_base_freq=9.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert read_family_config(tmp_path) == model
    gone = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern", "query_pre_attn_scalar")
    edit_family_config(tmp_path, **dict.fromkeys((*gone, "head_dim", "sliding_window", "num_key_value_heads"), "gone"))
    edit_family_config(tmp_path, num_hidden_layers=12)
    left_out, theirs = read_family_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert left_out.full_attention_layers == [n for n, k in enumerate(theirs.layer_types) if k == "full_attention"]
    assert (left_out.head_dim, left_out.num_query_groups) == (theirs.head_dim, theirs.num_key_value_heads)
    assert left_out.sliding_window == theirs.sliding_window
    assert left_out.attention_scale == theirs.query_pre_attn_scalar**-0.5
    ropes = theirs.rope_parameters
    assert left_out.rope_theta == ropes["full_attention"]["rope_theta"]
    assert left_out.local_rope_theta == ropes["sliding_attention"]["rope_theta"]


def test_a_sliding_window_is_read(tmp_path: Path) -> None:
    model = write_family_checkpoint("mistral", tmp_path)
    assert (model.max_position_embeddings, model.sliding_window) == (64, 5)
    edit_family_config(tmp_path, sliding_window=None)
    assert read_family_config(tmp_path).sliding_window is None
    edit_family_config(tmp_path, sliding_window="gone")
    assert read_family_config(tmp_path).sliding_window == 4096


def test_fingerprints_of_drawn_models_tell_families_apart() -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}
    latent = {"num_experts": 2, "experts_per_token": 1}
    latent |= {"kv_latent_size": 6, "rope_head_size": 2, "value_head_size": 4}
    indexer = {"query_latent_size": 4, "rope_interleaved": True}
    indexer |= {"attended_positions": 3, "indexer_heads": 2, "indexer_head_size": 4}
    delta = {"num_experts": 2, "experts_per_token": 1, "shared_ffn_size": 8, "delta_key_heads": 2}
    delta |= {"delta_value_heads": 2, "delta_key_size": 4, "delta_value_size": 4, "delta_kernel_size": 2}
    bounded = {"head_size": 8, "num_experts": 2, "experts_per_token": 1, "swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    yarn = {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    yarn["original_max_position_embeddings"] = 2.0
    models = [
        ModelConfig(name="x", family=family, max_position_embeddings=4, **sizes | more)  # type: ignore[arg-type]
        for family, more in (
            ("gpt2", {}),
            ("llama", {}),
            ("llama", {"rope_theta": 5.0}),
            ("llama", {"num_kv_heads": 1}),
            ("gpt_neox", {}),
            ("gpt_neox", {"parallel_residual": False}),
            ("mixtral", {"num_experts": 2, "experts_per_token": 1}),
            ("mixtral", {"num_experts": 2, "experts_per_token": 2}),
            ("mixtral", {"num_experts": 3, "experts_per_token": 2}),
            ("mixtral", {"num_experts": 3, "experts_per_token": 2, "normalize_expert_weights": False}),
            ("glm4_moe", {"num_experts": 2, "experts_per_token": 1}),
            ("glm4_moe", {"num_experts": 2, "experts_per_token": 1, "shared_ffn_size": 8}),
            ("glm4_moe", {"num_experts": 2, "experts_per_token": 1, "expert_weight_scale": 2.0}),
            ("glm4_moe", {"num_experts": 2, "experts_per_token": 1, "qk_norm": True}),
            ("granite", {}),
            ("granite", {"embedding_multiplier": 2.0}),
            ("granite", {"residual_multiplier": 2.0}),
            ("granite", {"logits_divisor": 2.0}),
            ("ministral3", {"rope_scaling": yarn}),
            ("ministral3", {"rope_scaling": yarn, "query_growth": 0.1}),
            ("seed_oss", {}),
            ("smollm3", {}),
            ("smollm3", {"unturned_layers": [0]}),
            ("minimax_m2", {"num_experts": 2, "experts_per_token": 1}),
            ("minimax_m2", {"num_experts": 2, "experts_per_token": 1, "rotary_fraction": 0.5}),
            ("deepseek_v3", {**latent}),
            ("deepseek_v3", {**latent, "kv_latent_size": 4}),
            ("deepseek_v3", {**latent, "query_latent_size": 4}),
            ("deepseek_v3", {**latent, "value_head_size": 2}),
            ("deepseek_v3", {**latent, "rope_interleaved": True}),
            ("deepseek_v32", {**latent, **indexer}),
            ("glm_moe_dsa", {**latent, **indexer}),
            ("glm_moe_dsa", {**latent, **indexer, "attended_positions": 2}),
            ("glm_moe_dsa", {**latent, **indexer, "layers_without_indexer": [1], "num_layers": 2}),
            ("qwen3_next", {**delta}),
            ("qwen3_next", {**delta, "full_attention_layers": [0]}),
            ("qwen3_next", {**delta, "delta_value_heads": 4}),
            ("gpt_oss", {**bounded}),
            ("gpt_oss", {**bounded, "swiglu_alpha": 2.0}),
            ("gpt_oss", {**bounded, "swiglu_limit": 2.0}),
        )
    ]
    assert len({compute_base_fingerprint(model, 0) for model in models}) == len(models)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama_tied", "qwen2", "qwen3", "ministral3", "phi3_long", "minimax_m2_long", "deepseek_v3"),
        *("glm_moe_dsa", "gpt_oss"),
    ],
)
def test_angles_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    theirs = LlamaRotaryEmbedding(build_family_model(name).config)
    torch.testing.assert_close(compute_frequencies(model), theirs.inv_freq, rtol=1e-6, atol=0)
    positions_BS = torch.arange(40).view(2, 20)
    ours = Rotary(model, torch.float32, torch.device("cpu")).compute_angles(positions_BS)
    for own_SB1F, cos_BSD in zip(ours[0].of_keys, theirs(torch.empty(0), positions_BS), strict=True):
        expected_SBF = cos_BSD[..., : own_SB1F.shape[-1]].transpose(0, 1)
        torch.testing.assert_close(own_SB1F[:, :, 0], expected_SBF, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_size", [32, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(
    "options", [{}, {"beta_fast": 16, "beta_slow": 2}, {"attention_factor": 1.5}, {"truncate": False}], ids=str
)
def test_yarn_is_that_of_transformers(options: dict, theta: float, head_size: int) -> None:
    """At the sizes of real heads, where its bounds lie inside."""
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 4096} | options
    config = Qwen3Config(head_dim=head_size, max_position_embeddings=16384, rope_parameters=rope)
    model = ModelConfig(**HF_FAMILIES["qwen3"].read_fields(config.to_dict(), Path("config.json")), name="yarn")
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(compute_frequencies(model), theirs.inv_freq, rtol=1e-5, atol=0)
    assert model.rope_scaling["attention_factor"] == pytest.approx(theirs.attention_scaling)


def test_yarn_put_in_by_hand_lengthens_the_context(tmp_path: Path) -> None:
    """As model cards say to: with max_position_embeddings left at what the model was trained with."""
    write_family_checkpoint("qwen3", tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_family_config(tmp_path, rope_parameters="gone", rope_theta=100.0, rope_scaling=scaling)
    assert read_family_config(tmp_path).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 48),
        ({"original_max_position_embeddings": 20}, 20),
        ({"rope_parameters": "gone"}, 64),
    ],
)
def test_longrope_holds_up_to_the_original_context(changes: dict, context: int, tmp_path: Path) -> None:
    """Beyond it the frequencies of all positions are others. Its first name was su."""
    write_family_checkpoint("phi3_long", tmp_path)
    edit_family_config(tmp_path, **changes)
    model = read_family_config(tmp_path)
    assert model.max_position_embeddings == context
    assert model.rope_divisors == ([] if context == 64 else [1.0, 1.5])
    if model.rope_divisors:
        older = {"type": "su", "short_factor": [1.0, 1.5]}
        edit_family_config(tmp_path, rope_parameters="gone", rope_scaling=older, rope_theta=100.0)
        assert read_family_config(tmp_path) == model
