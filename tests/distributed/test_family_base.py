"""Biases and whole modules beside the adapters of every family: gradients, PEFT's files both ways, merging, BitFit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import read_in, write_with_peft
from family_models import FAMILIES
from family_toy import build_family_model, compute_family_logits, write_family_checkpoint
from hf_toy import draw_tokens
from processes import run_distributed
from safetensors.torch import load_file, save_file
from test_baselines import MODEL, RUN, call, run_training
from test_dtypes import train as train_in
from test_family_adapters import compute_peft_logits
from test_family_gradients import MODELS, TOLERANCE, TOPOLOGIES, run_case
from test_modules_to_save import check_topologies, merge
from tiers import few_of
from toy import Case
from transformers import AutoModelForCausalLM

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.checkpoint.convert import export_adapter
from lora_dist.cli.compose import compose_config
from lora_dist.cli.inputs import check_inputs
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.base_values import compute_stored_shapes
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.lora.spec import CANONICAL_TARGETS
from lora_dist.lora.targets import build_adapter_specs, compute_linear_shapes
from lora_dist.lora.trained_base import list_biases, list_trained_base
from lora_dist.saved_modules import is_saved, list_saved_modules

MANY = [{"tp_size": 2, "sequence_parallel": True}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 2}]
_QKV = ["q_proj", "k_proj", "v_proj"]


def build_lora(model: ModelConfig) -> LoraConfig:
    """Every module that can train whole, and biases where there are some."""
    bias = "lora_only" if model.architecture.has_biases else "none"
    there = compute_linear_shapes(model, 0)
    inputs = [target for target in CANONICAL_TARGETS if target in there and target[0] in "qkv"]
    targets = [*inputs, "o_proj" if model.architecture.experts else "down_proj"]
    return LoraConfig(rank=2, alpha=4, target_modules=targets, bias=bias, modules_to_save=list_saved_modules(model))


@pytest.mark.parametrize("name", few_of(MODELS, "llama", "gemma3_text", "gpt_oss", "gpt_neox"))
def test_gradients_equal_one_process(name: str) -> None:
    case = Case(model=MODELS[name], lora=build_lora(MODELS[name]))
    expected_loss, expected = run_case(case)
    names = list_trained_base(
        build_adapter_specs(case.lora, MODELS[name]), MODELS[name], case.lora.bias, case.lora.modules_to_save
    )
    assert set(names) <= expected.keys()
    assert any(name.endswith("linear_qkv.bias") for name in names) == MODELS[name].architecture.has_biases
    for options in TOPOLOGIES[1:4:2]:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for key, gradient in expected.items():
            assert (actual[key] - gradient).abs().max() < TOLERANCE * gradient.abs().max(), (options, key)


@pytest.mark.parametrize("name", few_of(["qwen2", "qwen3", "gpt_neox"], "qwen2"))
def test_over_a_low_precision_base_they_train_in_fp32(name: str) -> None:
    case = Case(model=MODELS[name], lora=build_lora(MODELS[name]), dtype=torch.float32)
    exact = run_distributed(train_in, 1, case, 0)[0][0]
    for losses, _, dtypes in run_distributed(train_in, 2, replace(case, dtype=torch.bfloat16, tp_size=2), 1):
        assert losses == pytest.approx(exact, abs=0.02)
        assert dtypes == {"torch.float32"}


@pytest.mark.parametrize("name", ["opt", "qwen2"])
def test_bitfits_gradients_equal_one_process(name: str) -> None:
    case = Case(model=MODELS[name], method="bitfit")
    expected = run_case(case)[1]
    assert set(expected) == set(list_biases(MODELS[name]))
    for options in TOPOLOGIES[1:4:2]:
        actual = run_case(replace(case, **options))[1]
        for key, gradient in expected.items():
            assert (actual[key] - gradient).abs().max() < TOLERANCE * gradient.abs().max(), (options, key)


@pytest.mark.parametrize("family", ["opt", "qwen2"])
def test_bitfits_biases_are_merged_into_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = [*MODEL, f"model.family={family}"]
    words = [*RUN, *model, "method=bitfit", f"run_dir={tmp_path / 'run'}", "topology=tp2_sp"]
    run_distributed(run_training, 2, words)
    adapter = tmp_path / "run" / "adapter"
    words = ["merge", *model, f"adapter={adapter}", f"output={tmp_path / 'merged'}", "topology=pp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    trained = load_file(adapter / "adapter_model.safetensors")
    assert {key for key in merged if key.endswith(".bias")} == {k.removeprefix("base_model.model.") for k in trained}
    for key, tensor in trained.items():
        assert torch.equal(merged[key.removeprefix("base_model.model.")], tensor)
        assert tensor.abs().max() > 0


@pytest.mark.parametrize("name", few_of(FAMILIES, "llama", "gemma3_text", "gpt_oss", "opt"))
def test_peft_reads_the_one_file_of_every_topology(name: str, tmp_path: Path) -> None:
    lora = build_lora(write_family_checkpoint(name, tmp_path / "base"))
    check_topologies(tmp_path, lora, MANY[1:] if name == "llama" else MANY[:1])


PEFTS_OWN = {
    "llama": ({"modules_to_save": ["embed_tokens", "lm_head"]}, ["embed_tokens", "lm_head"]),
    "mistral": ({"modules_to_save": ["norm"]}, ["input_layernorm", "post_attention_layernorm", "norm"]),
    "qwen2": ({"bias": "all", "modules_to_save": ["model.norm"]}, ["norm"]),
    "qwen3": ({"modules_to_save": ["lm_head", "k_norm"]}, ["lm_head", "k_norm"]),
    "olmo2": (
        {"modules_to_save": ["q_norm", "post_attention_layernorm", "post_feedforward_layernorm"]},
        ["q_norm", "post_attention_layernorm", "post_feedforward_layernorm"],
    ),
    "minimax_m2": ({"modules_to_save": ["q_norm", "k_norm"]}, ["q_norm", "k_norm"]),
    "gpt_neox": (
        {"bias": "lora_only", "modules_to_save": ["lm_head", "final_layer_norm"]},
        ["lm_head", "final_layer_norm"],
    ),
    "opt": ({"bias": "lora_only", "modules_to_save": ["final_layer_norm"]}, ["final_layer_norm"]),
}


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_what_peft_trained_comes_in_and_goes_out(name: str, tmp_path: Path) -> None:
    options, modules = PEFTS_OWN[name]
    base, source = tmp_path / "base", tmp_path / "source"
    model = write_family_checkpoint(name, base)
    targets = ["query_key_value"] if name == "gpt_neox" else _QKV
    write_with_peft(build_family_model(name), source, target_modules=targets, r=2, **options)
    stored = read_in(source, tmp_path / "stored", model)
    assert set(stored.modules) == set(modules)
    export_adapter(stored, tmp_path / "out", "peft")
    assert read_in(tmp_path / "out", tmp_path / "again", model).modules == stored.modules
    tensors = [load_file(directory / "adapter_model.safetensors") for directory in (source, tmp_path / "out")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    expected = compute_peft_logits(base, source)
    assert torch.equal(compute_peft_logits(base, tmp_path / "out"), expected)
    run_distributed(merge, 2, {"tp_size": 2}, base, tmp_path / "stored", tmp_path / "merged")
    assert (
        compute_family_logits(tmp_path / "merged", draw_tokens()) - expected
    ).abs().max() < 1e-5 * expected.abs().max()


def test_a_module_by_its_name_before_transformers_5_comes_in(tmp_path: Path) -> None:
    model = write_family_checkpoint("gpt_neox", tmp_path / "base")
    options = {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}
    write_with_peft(build_family_model("gpt_neox"), tmp_path / "new", r=2, **options)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "adapter_model.safetensors"
    save_file({key.replace("lm_head", "embed_out"): tensor for key, tensor in load_file(path).items()}, path)
    config = tmp_path / "old" / "adapter_config.json"
    config.write_text(config.read_text().replace("lm_head", "embed_out"))
    old, new = (read_in(tmp_path / name, tmp_path / f"{name}-stored", model).read() for name in ("old", "new"))
    assert old.modules == new.modules == ["lm_head"]
    assert all(torch.equal(value, new.values[name]) for name, value in old.values.items())
    path = tmp_path / "new" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.embed_out.weight": tensors["base_model.model.lm_head.weight"] + 1}, path)
    with pytest.raises(ValueError, match=r"embed_out\.weight is neither a LoRA factor nor a bias"):
        read_in(tmp_path / "new", tmp_path / "both-stored", model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen2", {"modules_to_save": ["embed_tokens"]}, "unties the output layer from the embedding"),
        ("llama", {"modules_to_save": ["layers.0.input_layernorm"]}, "here all input_layernorm train or none"),
        ("mistral", {"modules_to_save": ["mlp"]}, "names mlp; only embed_tokens, lm_head, input_layernorm, post_att"),
        ("opt", {"modules_to_save": ["final_layer_norm"], "bias": "all"}, "both hold the norms' biases"),
    ],
)
def test_what_this_model_cannot_hold_is_refused(name: str, options: dict, message: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path / "base")
    write_with_peft(build_family_model(name), tmp_path / "source", target_modules=_QKV, r=2, **options)
    with pytest.raises(ValueError, match=message):
        read_in(tmp_path / "source", tmp_path / "stored", model)


def test_a_bias_that_peft_trained_on_some_of_q_k_v_is_refused(tmp_path: Path) -> None:
    model = write_family_checkpoint("opt", tmp_path / "base")
    options = {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}
    write_with_peft(build_family_model("opt"), tmp_path / "source", r=2, **options)
    with pytest.raises(ValueError, match=r"linear_qkv\.bias has no adapter on k_proj; adapt all three or use bias=all"):
        read_in(tmp_path / "source", tmp_path / "stored", model)


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_have_transformers_names(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    for module in list_saved_modules(model):
        names = [each for each in compute_canonical_shapes(model) if is_saved(each, [module], model)]
        found = {HF_FAMILIES[model.family].find_module(each) for each in compute_stored_shapes(names, model)}
        assert found
        assert found <= {full for full, _ in build_family_model(name).named_modules()}
        assert {full.split(".")[-1] for full in found} == {module}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama3_8b", "lora.bias=all"], r"lora\.bias=all: model\.family=llama has no biases"),
        (["model=llama3_8b", "method=bitfit"], r"method=bitfit trains biases, and model\.family=llama has none"),
        (
            ["model=llama3_8b", "lora.modules_to_save=[wte]"],
            "'wte' is not one of embed_tokens, lm_head, input_layernorm",
        ),
        (
            ["model=qwen2_5_7b", "lora.bias=lora_only", "lora.target_modules=[o]"],
            "no linear that is adapted has a bias",
        ),
        (["model=opt_125m", "model.num_kv_heads=4"], "model.family=opt has as many of both; leave it null"),
        (["model=qwen2_5_7b", "lora.bias=lora_only"], "has no adapter on k_proj; adapt all three or use bias=all"),
    ],
)
def test_a_wrong_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(compose_config(["data=fake", *overrides]), 1, ["lora"])
