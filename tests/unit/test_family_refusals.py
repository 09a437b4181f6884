"""What of a family's configuration is not computed here, and what it cannot have: refused in a line."""

from pathlib import Path

import pytest
from family_toy import build_family_model, edit_family_config, read_family_config, write_family_checkpoint
from safetensors.torch import load_file, save_file
from wrapper_toy import edit_text_config, write_wrapper

from lora_dist.cli.compose import compose_config
from lora_dist.files.hf_checkpoint import check_hf_checkpoint


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config with quant_method=None is not supported"),
        (
            "llama",
            {"quantization_config": "fp8"},
            "quantization_config='fp8' is no JSON object; convert the weights to",
        ),
        ("gpt_neox", {"use_parallel_residual": False}, "model.parallel_residual=True but"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' is not supported, only default"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not supported, only default, linear, l"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'llama3' has no number high_freq_factor"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "truncate": "no"}},
            "'yarn' with truncate='no', which is n",
        ),
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
        ("llama", {"rope_parameters": []}, "rope_parameters (or rope_scaling) is [], no JSON object"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 0}},
            "model.rope_scaling: factor=0.0 must be positive",
        ),
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
        ("qwen3_next", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported, only 1"),
        ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported, only [] or None"),
        ("qwen3_next", {"output_router_logits": True}, "output_router_logits=True asks for a loss that"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "times full_attention or linear_attention"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}, "model.full_attention_layers=[1, 3] but"),
        (
            "qwen3_next",
            {"linear_num_key_heads": 3},
            "model.delta_key_heads=3 does not divide model.delta_value_heads=8",
        ),
        ("qwen3_next", {"linear_conv_kernel_dim": 3}, "model.delta_kernel_size=4 but"),
        ("qwen3_next", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not supported, only default, linear"),
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
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head' is not supported, only 'per_layer'"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False is not supported, only True"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False is not supported, only True"),
        (
            "minimax_m2",
            {"attn_type_list": [1, 0, 1, 1]},
            "attn_type_list=[1, 0, 1, 1] is not supported, only 4 times 1",
        ),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8 is not supported, only 0"),
        ("minimax_m2", {"sliding_window": 8}, "sliding_window=8 is not supported, only None"),
        ("minimax_m2", {"output_router_logits": True}, "output_router_logits=True asks for a loss that"),
        ("minimax_m2", {"rope_parameters": "gone", "rotary_dim": "x"}, "rotary_dim='x' is not a positive integer"),
        ("minimax_m2", {"rope_parameters": "gone", "rotary_dim": 2}, "model.rope_theta=500.0 but"),
        ("granite", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("granite", {"logits_scaling": "x"}, "logits_scaling='x' is not a number"),
        ("granite", {"logits_scaling": 0.0}, "model.logits_divisor=0.0 must be positive"),
        ("granite", {"embedding_multiplier": 1.0}, "model.embedding_multiplier=3.0 but"),
        ("granite", {"attention_multiplier": "gone"}, "model.attention_scale=0.3 but"),
        ("seed_oss", {"attention_bias": False}, "attention_bias=False is not supported, only True"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias=True is not supported, only False"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
        ("seed_oss", {"residual_dropout": "x"}, "residual_dropout='x' is not a number"),
        ("ministral3", {"layer_types": ["full_attention"] * 4}, "is not supported, only None"),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}, "rope type 'default' is not supported, only y"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "llama_4_scaling_beta=None of rope_parameters is not a number",
        ),
        ("ministral3", {"rope_parameters": "gone"}, "model.max_position_embeddings=64 but"),
        ("smollm3", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] is not a list of 4 times 1, a layer with"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "no_rope_layers=[1, 0, 1, 2] is not a list of 4 times 1"),
        ("smollm3", {"no_rope_layers": None}, "model.unturned_layers=[1] but"),
        (
            "smollm3",
            {"layer_types": ["sliding_attention"] * 4},
            "use_sliding_window=False and sliding_window=None give",
        ),
        ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (
            "olmo3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "do not say which layers they are for; wri",
        ),
        (
            "olmo3",
            {"rope_parameters": "gone", "rope_theta": 7.0},
            "rope_theta=7.0 do not say which layers they are for",
        ),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope type 'yarn' of sliding_attention is not supported, only default",
        ),
        ("olmo3", {"sliding_window": None}, "sliding_window=None is not a positive integer"),
        ("olmo3", {"layer_types": ["full_attention"]}, "layer_types is not a list of 4 times"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False is not supported, only True"),
        ("gpt_oss", {"output_router_logits": True}, "output_router_logits=True asks for a loss that"),
        ("gpt_oss", {"attention_dropout": 0.1}, "model.attention_dropout=0.1: attention with sinks, of gpt_oss, "),
        ("gpt_oss", {"swiglu_limit": 7.0}, "model.swiglu_limit=1.2 but"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "model.family=gpt_oss needs a positive model.swiglu_limit"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "model.sliding_window=5 but"),
        ("gpt_oss", {"head_dim": 4}, "model.head_size=4 of gpt_oss must be a multiple of 8"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "awq"}},
            "quant_method='awq' is not supported, only 'fp8' or 'fbgemm_fp8' or 'compressed-tensors'; convert the",
        ),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "model.family=deepseek_v3 has as many of both; leave it null"),
        ("deepseek_v3", {"q_lora_rank": None}, "model.query_latent_size=20 but"),
        ("deepseek_v3", {"kv_lora_rank": "x"}, "kv_lora_rank='x' is not a positive integer"),
        (
            "deepseek_v3",
            {"v_head_dim": 11},
            "config.json: v_head_dim=11 exceeds qk_nope_head_dim + qk_rope_head_dim=10, and the fused attention kernels"
            " want both alike, for which values alone are padded here; name a checkpoint with a smaller v_head_dim",
        ),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "3 of its features that"),
        ("deepseek_v3", {"rope_interleave": False}, "model.rope_interleaved=True but"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "mscale": "1"}}, "mscale='1' is not a number"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank=None is not a positive integer"),
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave=False is not supported, only True"),
        ("deepseek_v32", {"index_topk": 48}, "model.attended_positions=32 but"),
        ("deepseek_v32", {"index_n_heads": 0}, "index_n_heads=0 is not a positive integer"),
        ("deepseek_v32", {"index_head_dim": 3}, "model.indexer_head_size=3 is below model.rope_head_size=4"),
        (
            "deepseek_v32",
            {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
            "only 4 of them, dense before sp",
        ),
        ("deepseek_v32", {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, "model.num_dense_layers=1 but"),
        ("deepseek_v32", {"layer_types": ["full_attention"] * 4}, "layer_types=['full_attention', 'full_attention', "),
        ("glm_moe_dsa", {"indexer_types": ["full"] * 4}, "model.layers_without_indexer=[1, 3] but"),
        ("glm_moe_dsa", {"indexer_types": ["full"] * 5}, "is not a list of 4 times full or shared"),
        ("glm_moe_dsa", {"indexer_types": None, "index_topk_pattern": "SFFF"}, "model.layers_without_indexer: layer 0"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 differs from hidden_size=32"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("opt", {"activation_function": "gelu"}, "activation_function='gelu'"),
    ],
)
def test_what_is_not_computed_here_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    edit_family_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        check_hf_checkpoint(model, tmp_path)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mixture", r"layers.0.mlp.experts.\w+_proj, of all experts of a layer, and .*experts.0.*, of one; write"),
        ("transposed", r"gate_up_proj has shape \(4, 32, 96\), config.json says \(4, 96, 32\)"),
        ("incomplete", r"has no tensor model.layers.3.mlp.experts.down_proj; the checkpoint is incomplete"),
        ("setting", r"model.stacked_experts=None but .*config.json has out_in; set model.stacked_experts=out_in"),
    ],
)
def test_stacked_experts_that_do_not_fit_are_named(change: str, message: str, tmp_path: Path) -> None:
    single = write_family_checkpoint("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    of_single = load_file(path)
    build_family_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    tensors, name = load_file(path), "model.layers.0.mlp.experts.gate_up_proj"
    if change == "mixture":
        tensors |= {key: one for key, one in of_single.items() if "layers.2" in key}
    elif change == "transposed":
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    elif change == "incomplete":
        del tensors["model.layers.3.mlp.experts.down_proj"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        check_hf_checkpoint(single if change == "setting" else read_family_config(tmp_path), tmp_path)


def test_a_stack_that_is_square_is_refused_where_both_ways_are_published(tmp_path: Path) -> None:
    write_wrapper("qwen3_vl_moe", tmp_path)
    check_hf_checkpoint(read_family_config(tmp_path), tmp_path)
    edit_text_config(tmp_path, moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"hidden_size=32 and moe_intermediate_size=16 a stack of experts is square"):
        read_family_config(tmp_path)
    edit_text_config(tmp_path, moe_intermediate_size=20)
    with pytest.raises(ValueError, match=r"has shape \(4, 48, 32\), which config.json gives it neither way round"):
        read_family_config(tmp_path)


@pytest.mark.parametrize("name", ["llama3_8b", "gpt_oss_20b"])
def test_stacks_are_of_families_that_have_both(name: str) -> None:
    with pytest.raises(ValueError, match=r"model.stacked_experts=out_in: files of \w+ are all alike in that; leave it"):
        compose_config([f"model={name}", "model.stacked_experts=out_in"])


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
        ("model.unturned_layers=[1]", "model.unturned_layers=[1]: positions turn all layers of llama; leave it empty"),
        ("model.logits_divisor=2", "model.logits_divisor=2.0: llama has none of it; leave it 1.0"),
        ("model.query_growth=0.1", "model.query_growth=0.1: llama has none of it; leave it 0"),
        ("model.shared_ffn_size=4", "model.shared_ffn_size=4: llama has none of it; leave it null"),
        ("model.expert_weight_scale=2", "model.expert_weight_scale=2.0: llama has none of it; leave it 1.0"),
        ("model.swiglu_limit=7", "model.swiglu_limit=7.0: llama has none of it; leave it null"),
        ("model.rope_scaling={factor:2,truncate:0}", "model.rope_scaling has factor, truncate; it takes {} or"),
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
        (
            ["model=ministral3_8b", "model.query_growth=-0.1"],
            "model.query_growth=-0.1 must be at least 0, and above it needs YaRN's",
        ),
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
            "and the 96 inputs of kv_b_proj over tp 1 are no multiple of 64",
        ),
        (["model=glm4_5", "model.indexer_heads=2"], "model.indexer_heads=2: glm4_moe has none of it; leave it null"),
        (["model=glm5", "model.attended_positions=null"], "model.family=glm_moe_dsa needs model.attended_positions"),
        (["model=glm5", "model.rope_interleaved=false"], "glm_moe_dsa turns neighbours; set it true"),
        (
            ["model=deepseek_v3_2", "data.seq_len=163841"],
            "data.seq_len=163841 exceeds model.max_position_embeddings=163840; set data.seq_len to 163840 or less",
        ),
        (
            ["model=glm5", "model.layers_without_indexer=[2,39]", "data.seq_len=2049", "topology.pp_size=2"],
            "topology.pp_size=2: rows of 2049 positions exceed model.attended_positions=2048, and the stage that begins"
            " with layer 39",
        ),
        (
            ["model=llama3_8b", "model.stages_begin_at_indexers=true"],
            "model.stages_begin_at_indexers=True: llama has none of it; leave it False",
        ),
        (["model=llama3_8b", "model.delta_key_size=8"], "model.delta_key_size=8: llama has none of it; leave it null"),
        (["model=qwen3_next_80b_a3b", "model.delta_key_size=null"], "qwen3_next needs model.delta_key_size"),
        (["model=qwen3_next_80b_a3b", "model.shared_ffn_size=null"], "qwen3_next needs model.shared_ffn_size"),
        (["model=qwen3_next_80b_a3b", "model.num_dense_layers=1"], "model.num_dense_layers=1: qwen3_next has none of"),
        (["model=qwen3_next_80b_a3b", "model.delta_key_heads=4", "topology=tp8"], "tp 8 does not divide delta_key_he"),
        (["model=qwen3_next_80b_a3b", "cuda_graphs=true"], "cuda_graphs=true: how many rows an expert of"),
        (["model=glm4_5", "model.dense_ffn_size=null"], "num_dense_layers=3 and dense_ffn_size=None: give both or n"),
        (["model=glm4_5", "model.shared_ffn_size=12", "topology=tp8"], "tp 8 does not divide shared_ffn_size 12"),
    ],
)
def test_what_a_family_has_not_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(["data=fake", *overrides])
