"""What a family's configuration may say and what is refused, its names, and its angles."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_toy import (
    FAMILIES,
    ONE_EACH,
    build_family_model,
    name_as_stored,
    read_family_config,
    write_family_checkpoint,
)
from transformers import AutoConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, read_model_fields
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
    shapes = family.compute_shapes(model)
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


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_every_target_of_experts_is_in_a_parameter_of_transformers(name: str, tmp_path: Path) -> None:
    model, theirs = write_family_checkpoint(name, tmp_path), build_family_model(name)
    for parameter, targets in PEFT_TARGETS.items():
        (in_features,) = {compute_linear_shapes(model, 2)[target][0] for target in targets}
        num_rows = sum(len(rows) for rows in find_rows(ExpertParameter(2, parameter), model).values())
        stacked = theirs.get_parameter(ExpertParameter(2, parameter).full_name)
        assert stacked.shape == (find_num_experts(targets[0], model, 2), num_rows, in_features)


def edit(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("gpt_neox", {"use_parallel_residual": False}, "model.parallel_residual=True but"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' is not supported, only default"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not supported, only default, linear, l"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'llama3' has no number high_freq_factor"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "'yarn' with truncate=False"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor='4' is not a number"),
        ("phi3_long", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' has no list short_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported, only default, longrope"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported, only None"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types is not a list of 4 times"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
            "rope type 'yarn' of sliding_attention is not supported, only default",
        ),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not supported, only 0.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads='2' is not a positive integer"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters (or rope_scaling) is [1], no JSON object"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta='x' is not a number"),
        ("gpt_neox", {"layer_norm_eps": "x"}, "layer_norm_eps='x' is not a number"),
        ("llama", {"num_key_value_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=8"),
        ("llama", {"tie_word_embeddings": True}, "model.tied_output=False but"),
        ("llama", {"rope_theta": 7.0, "rope_parameters": "gone"}, "model.rope_theta=100.0 but"),
        ("llama", {"model_type": "mistral"}, "model.family=llama but"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window='yes'"),
        (
            "qwen3",
            {"layer_types": ["linear_attention"] * 4, "use_sliding_window": True, "sliding_window": 5},
            "is not a l",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported, only 0.0"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits=True asks for a loss that"),
        ("mixtral", {"num_experts_per_tok": 5}, "model.experts_per_token=5 exceeds model.num_experts=4"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported, only []"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported, only 1"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported, only False"),
        ("qwen3_moe", {"num_local_experts": 5}, "model.num_experts=6 but"),
        ("qwen3_moe", {"norm_topk_prob": False}, "model.normalize_expert_weights=True but"),
        ("glm4_moe", {"attention_bias": False}, "attention_bias=False is not supported, only True"),
        ("glm4_moe", {"output_router_logits": True}, "output_router_logits=True asks for a loss that"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "model.num_dense_layers=4 leaves none of 4 layers to experts"),
        ("glm4_moe", {"first_k_dense_replace": "x"}, "first_k_dense_replace='x' is not a positive integer"),
        ("glm4_moe", {"n_group": 3}, "model.num_expert_groups=3: they must be groups of equal size of model.num_ex"),
        ("glm4_moe", {"topk_group": 1}, "of 2 experts: a group needs two or more, and 1 groups model.experts_per_to"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "model.expert_weight_scale=0.0 must be positive"),
        ("glm4_moe", {"routed_scaling_factor": 2}, "model.expert_weight_scale=1.7 but"),
        ("glm4_moe", {"n_shared_experts": 1}, "model.shared_ffn_size=32 but"),
        ("glm4_moe", {"use_qk_norm": False}, "model.qk_norm=True but"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config={'quant_method': 'fp8'}",
        ),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "model.family=deepseek_v3 has as many of both; leave it null"),
        ("deepseek_v3", {"q_lora_rank": None}, "model.query_latent_size=20 but"),
        ("deepseek_v3", {"kv_lora_rank": "x"}, "kv_lora_rank='x' is not a positive integer"),
        ("deepseek_v3", {"v_head_dim": 11}, "model.value_head_size=11 exceeds model.head_size=10"),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "3 of its features that"),
        ("deepseek_v3", {"rope_interleave": False}, "model.rope_interleaved=True but"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "mscale": "1"}}, "mscale='1' is not a number"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 differs from hidden_size=32"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"activation_function": "gelu"}, "activation_function='gelu'"),
    ],
)
def test_what_is_not_computed_here_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        check_hf_checkpoint(model, tmp_path)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_stacked_in_one_tensor_are_named(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    build_family_model(name).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.gate_up_proj holds all experts of a layer, as transf"):
        check_hf_checkpoint(model, tmp_path)


def test_older_configurations_say_the_same(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, at first with `type`."""
    model = write_family_checkpoint("llama", tmp_path)
    scaling = {"rope_type": "llama3", **model.rope_scaling}
    edit(tmp_path, rope_parameters="gone", rope_theta=100.0, rope_scaling=scaling, head_dim="gone")
    assert read_family_config(tmp_path) == model
    edit(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, num_key_value_heads=None)
    fields = read_model_fields(tmp_path)
    assert (fields["rope_scaling"], fields["num_kv_heads"]) == ({"factor": 2.0}, 8)


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("qwen3", {"rope_type": "yarn", "factor": 2.0}),
        ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    ],
)
def test_a_second_rotary_rule_is_refused(name: str, scaling: dict, tmp_path: Path) -> None:
    """As model cards say to put one in, beside what transformers 5 saved; transformers itself takes the second."""
    write_family_checkpoint(name, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    edit(tmp_path, rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"move what is meant into rope_parameters and leave rope_scaling") as refusal:
        read_model_fields(tmp_path)
    assert f"rope_parameters={saved.get('full_attention', saved)} and rope_scaling={scaling} are" in str(refusal.value)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "phi3_long", "gemma3_text"])
def test_a_rotary_rule_may_be_there_twice(name: str, tmp_path: Path) -> None:
    """In the words of transformers 4 beside what transformers 5 made of them."""
    model = write_family_checkpoint(name, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    older = dict(saved.get("full_attention", saved))
    older["type"] = older.pop("rope_type")
    theta = older.pop("rope_theta")
    edit(tmp_path, rope_scaling=older, rope_theta="gone" if name == "gemma3_text" else theta)
    assert read_family_config(tmp_path) == model


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_configuration_leaves_out_is_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    left_out = ("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "tie_word_embeddings")
    edit(tmp_path, num_attention_heads=32, hidden_size=128, **dict.fromkeys((*left_out, "rope_parameters"), "gone"))
    model, theirs = read_family_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert model.num_query_groups == theirs.num_key_value_heads
    assert model.head_dim == getattr(theirs, "head_dim", 4)
    assert model.sliding_window == (theirs.sliding_window if name == "mistral" else None)
    assert (model.layernorm_epsilon, model.tied_output) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]


def test_qwens_windows_are_read(tmp_path: Path) -> None:
    write_family_checkpoint("qwen2", tmp_path)
    edit(tmp_path, use_sliding_window=True, sliding_window=5, max_window_layers=3, layer_types="gone")
    assert read_family_config(tmp_path).full_attention_layers == [0, 1, 2]
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert [kind == "full_attention" for kind in theirs.layer_types] == [True, True, True, False]
    edit(tmp_path, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2)
    model = read_family_config(tmp_path)
    assert (model.sliding_window, model.full_attention_layers) == (5, [2, 3])
    edit(tmp_path, layer_types=["full_attention"] * 4)
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
    edit(tmp_path, layer_types=["full_attention"] * 4)
    assert read_family_config(tmp_path).sliding_window is None
    edit(tmp_path, layer_types=["chunked_attention"] * 4)
    with pytest.raises(ValueError, match="layer_types is not a list of 4 times full_attention or sliding_attention"):
        read_family_config(tmp_path)


def test_experts_that_transformers_4_wrote_are_read(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_moe", tmp_path)
    edit(tmp_path, num_local_experts="gone", num_experts=6, mlp_only_layers=None)
    assert read_family_config(tmp_path) == model


def test_gemmas_layers_are_read(tmp_path: Path) -> None:
    """As transformers 5 writes them, and as google's files had them before."""
    model = write_family_checkpoint("gemma3_text", tmp_path)
    assert (model.full_attention_layers, model.rope_theta, model.local_rope_theta) == ([2], 500.0, 9.0)
    assert (model.rope_scaling, model.attention_scale) == ({"factor": 2.0}, pytest.approx(6**-0.5))
    older = {"layer_types": "gone", "sliding_window_pattern": 3, "rope_parameters": "gone", "rope_theta": 500.0}
    edit(tmp_path, **older, rope_local_base_freq=9.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert read_family_config(tmp_path) == model
    gone = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern", "query_pre_attn_scalar")
    edit(tmp_path, **dict.fromkeys((*gone, "head_dim", "sliding_window", "num_key_value_heads"), "gone"))
    edit(tmp_path, num_hidden_layers=12)
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
    edit(tmp_path, sliding_window=None)
    assert read_family_config(tmp_path).sliding_window is None
    edit(tmp_path, sliding_window="gone")
    assert read_family_config(tmp_path).sliding_window == 4096


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.family=bert", "model.family='bert' is not one of gpt2, llama, mistral, qwen2, qwen3, mixtral, qwen"),
        ("model.num_kv_heads=0", "model.num_kv_heads=0 must be at least 1"),
        ("model.head_size=7", "model.head_size=7 must be even for rotary positions"),
        ("model.sliding_window=8", "model.sliding_window=8: llama sees all positions before; leave it null"),
        ("model.rotary_fraction=1.5", "model.rotary_fraction=1.5 must lie above 0, and up to 1"),
        ("model.rotary_fraction=0.01", "model.rotary_fraction=0.01: llama turns whole heads; leave it 1"),
        ("model.activation=gelu", "model.activation=gelu: llama has a gate; leave it null"),
        (
            "model.num_experts=4",
            "model.num_experts=4 and experts_per_token=None: a layer of llama has one MLP",
        ),
        ("model.shared_ffn_size=4", "model.shared_ffn_size=4: llama has none of it; leave it null"),
        ("model.expert_weight_scale=2", "model.expert_weight_scale=2.0: llama has none of it; leave it 1.0"),
        ("model.qk_norm=true", "model.qk_norm=True: all models of llama are alike in that; leave it null"),
        ("model.family=mixtral", "model.family=mixtral needs model.num_experts and model.experts_per_token"),
        ("model.parallel_residual=true", "a layer of llama has the MLP after the attention; leave it null"),
        ("model.rope_scaling={factor:2,beta:3}", "model.rope_scaling has beta, factor; it takes {} or {factor} or {"),
        ("model.rope_divisors=[1,2]", "model.rope_divisors are LongRoPE's"),
    ],
)
def test_shapes_that_are_none_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        compose_config(["model=llama3_8b", "data=fake", override])
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=gpt2_small", "model.activation=relu"], "model.activation='relu' is not one of gelu_tanh"),
        (
            ["model=pythia_410m", "model.rotary_fraction=0.05"],
            "3 of its features that model.rotary_fraction=0.05 turns",
        ),
        (
            ["model=mixtral_8x7b", "cuda_graphs=true"],
            "cuda_graphs=true: how many rows an expert of mixtral_8x7b",
        ),
        (["model=llama3_8b", "model.kv_latent_size=8"], "model.kv_latent_size=8: llama has none of it; leave it null"),
        (["model=llama3_8b", "model.rope_interleaved=true"], "llama has none of it; leave it false"),
        (["model=deepseek_v3", "model.kv_latent_size=null"], "model.family=deepseek_v3 needs model.kv_latent_size"),
        (["model=deepseek_v3", "model.rope_head_size=192"], "leaves none of model.head_size=192 unturned"),
        (["model=deepseek_v3", "model.rope_scaling.factor=1"], "deepseek_v3 has it with a longer context alone"),
        (
            [
                "model=deepseek_v3",
                "lora.target_modules=[kv_b_proj]",
                "model.kv_latent_size=96",
                "model.base_format=nf4",
            ],
            "and 96 inputs over tp 1 are no multiple of 64",
        ),
        (["model=glm4_5", "model.dense_ffn_size=null"], "num_dense_layers=3 and dense_ffn_size=None: give both or n"),
        (["model=glm4_5", "model.shared_ffn_size=12", "topology=tp8"], "tp 8 does not divide shared_ffn_size 12"),
    ],
)
def test_what_a_family_has_not_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(["data=fake", *overrides])


def test_fingerprints_of_drawn_models_tell_families_apart() -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}
    latent = {"num_experts": 2, "experts_per_token": 1}
    latent |= {"kv_latent_size": 6, "rope_head_size": 2, "value_head_size": 4}
    models = [
        ModelConfig(name="x", family=family, max_position_embeddings=4, **sizes, **more)  # type: ignore[arg-type]
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
            ("deepseek_v3", {**latent}),
            ("deepseek_v3", {**latent, "kv_latent_size": 4}),
            ("deepseek_v3", {**latent, "query_latent_size": 4}),
            ("deepseek_v3", {**latent, "value_head_size": 2}),
            ("deepseek_v3", {**latent, "rope_interleaved": True}),
        )
    ]
    assert len({compute_base_fingerprint(model, 0) for model in models}) == len(models)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "phi3_long", "deepseek_v3"])
def test_angles_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    theirs = LlamaRotaryEmbedding(build_family_model(name).config)
    torch.testing.assert_close(compute_frequencies(model), theirs.inv_freq, rtol=1e-6, atol=0)
    positions_BS = torch.arange(40).view(2, 20)
    ours = Rotary(model, torch.float32, torch.device("cpu")).compute_angles(positions_BS)
    for own_SB1F, cos_BSD in zip(ours[0], theirs(torch.empty(0), positions_BS), strict=True):
        expected_SBF = cos_BSD[..., : own_SB1F.shape[-1]].transpose(0, 1)
        torch.testing.assert_close(own_SB1F[:, :, 0], expected_SBF, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_size", [32, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("options", [{}, {"beta_fast": 16, "beta_slow": 2}, {"attention_factor": 1.5}])
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
    edit(tmp_path, rope_parameters="gone", rope_theta=100.0, rope_scaling=scaling)
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
    edit(tmp_path, **changes)
    model = read_family_config(tmp_path)
    assert model.max_position_embeddings == context
    assert model.rope_divisors == ([] if context == 64 else [1.0, 1.5])
    if model.rope_divisors:
        older = {"type": "su", "short_factor": [1.0, 1.5]}
        edit(tmp_path, rope_parameters="gone", rope_scaling=older, rope_theta=100.0)
        assert read_family_config(tmp_path) == model
