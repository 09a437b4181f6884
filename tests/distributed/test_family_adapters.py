"""Adapters of every family: written from shards, read by PEFT itself and back, merged, and in other tools' files."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapter_files import read_in, write_with_peft
from family_models import ONE_EACH
from family_toy import build_family_model, compute_family_logits, read_family_config, write_family_checkpoint
from hf_toy import build_hf_model, build_shard, compute_logits, count_processes, draw_adapter_values, draw_tokens
from lora_updates import compute_update
from processes import run_distributed
from tiers import exhaustive, few_of
from transformers import AutoModelForCausalLM

from lora_dist.checkpoint.adapter import load_adapter, write_adapter
from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.cli.main import main
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.bridge import to_bridge
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs, compute_linear_shapes
from lora_dist.mcore.adapters import apply_lora, find_shards
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.model import ShardedGpt
from lora_dist.whole import cut_shard, read_value

TOPOLOGIES = [{}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 2}, {"tp_size": 2, "sequence_parallel": True}]
LORA = LoraConfig(rank=3, alpha=4, target_modules=["all-linear"], rank_pattern={"o": 5}, alpha_pattern={"v": 2})


def list_specs(model: ModelConfig) -> list[AdapterSpec]:
    """Mistral, whose layers are Llama's, has DoRA, and so have GPT-NeoX and Qwen3.5. Experts have to be named."""
    lora = replace(LORA, use_dora=model.family in ("mistral", "gpt_neox", "qwen3_5_text"))
    if model.architecture.experts:
        more = ["gate_proj", "up_proj", "down_proj"]
        lora = replace(LORA, target_modules=["all-linear", *more], rank_pattern={"o": 5, "up_proj": 2, "w2": 4})
    if model.architecture.latent_attention:
        lora = replace(lora, alpha_pattern={"kv_b_proj": 2, "kv_a_proj": 3})
    specs = build_adapter_specs(lora, model)
    assert len(specs) == sum(len(compute_linear_shapes(model, layer)) for layer in range(model.num_layers))
    return specs


def write_and_compute(options: dict, base: Path, target: Path) -> torch.Tensor | None:
    model = read_family_config(base)
    gpt, specs = build_shard(options, model), list_specs(model)
    load_hf_checkpoint(gpt, base)
    trainable = apply_lora(gpt, specs, bias="none", seed=0)
    values = draw_adapter_values(specs, model, "none")
    with torch.no_grad():
        for one in trainable:
            one.parameter.copy_(cut_shard(values[one.name], one, gpt.topology))
    about = {"base_fingerprint": "base", "task": "toy", "step": 7, "metrics": {}}
    write_adapter(
        target,
        trainable=trainable,
        specs=specs,
        topology=gpt.topology,
        model=model,
        bias="none",
        read=read_value,
        **about,
    )
    for one in trainable:
        one.parameter.data.zero_()
    load_adapter(
        target,
        trainable=trainable,
        specs=specs,
        topology=gpt.topology,
        model=model,
        bias="none",
        base_fingerprint="base",
    )
    return compute_logits(gpt)


@torch.no_grad()
def compute_peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.eval()(draw_tokens()).logits


@pytest.mark.parametrize("name", few_of(ONE_EACH, "llama", "qwen3_next", "deepseek_v3", "gpt_oss", "gpt_neox"))
def test_peft_loads_what_every_topology_writes(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_family_checkpoint(name, base)
    for index, options in enumerate(TOPOLOGIES if name == "llama" else TOPOLOGIES[1:3]):
        target = tmp_path / str(index)
        results = run_distributed(write_and_compute, count_processes(options), options, base, target)
        assert (target / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "0" / "adapter_model.safetensors"
        ).read_bytes()
        expected = compute_peft_logits(base, target)
        assert (expected - compute_family_logits(base, draw_tokens())).abs().max() > 0.1
        for logits in results:
            assert logits is None or (logits - expected).abs().max() < 1e-5 * expected.abs().max()


TARGETS = {
    "mixtral": ["v_proj", "q_proj", "o_proj"],
    "qwen3_moe": ["k_proj", "o_proj"],
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "o_proj"],
    "qwen3_5_text": ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "gate_proj"],
    "qwen3_5_moe_text": ["in_proj_qkv", "in_proj_z", "in_proj_b", "k_proj", "o_proj"],
    "glm4_moe": ["k_proj", "v_proj"],
    "minimax_m2": ["q_proj", "k_proj", "o_proj"],
    "deepseek_v3": ["kv_a_proj_with_mqa", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
    "deepseek_v32": ["q_a_proj", "kv_b_proj"],
    "glm_moe_dsa": ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    "opt": ["v_proj", "q_proj", "fc1"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
    "phi3": ["gate_up_proj", "qkv_proj", "down_proj"],
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_adapter_that_peft_wrote_comes_in_and_goes_out_as_it_was(name: str, tmp_path: Path) -> None:
    base, source = tmp_path / "base", tmp_path / "source"
    model = write_family_checkpoint(name, base)
    targets = TARGETS.get(name, ["v_proj", "q_proj", "gate_proj", "down_proj"])
    write_with_peft(build_family_model(name), source, target_modules=targets, r=2, rank_pattern={targets[0]: 4})
    stored = read_in(source, tmp_path / "stored", model)
    for format in ("peft",) if model.architecture.fused_targets else ("peft", "peft_split"):
        export_adapter(stored, tmp_path / format, format)
        raw = [(directory / "adapter_model.safetensors").read_bytes() for directory in (source, tmp_path / format)]
        assert raw[0] == raw[1]
    assert torch.equal(compute_peft_logits(base, tmp_path / "stored"), compute_peft_logits(base, source))


@pytest.mark.parametrize("format", ["peft_split", "loralib", "bridge"])
def test_what_has_no_place_for_a_delta_nets_adapters_is_refused(format: str, tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_5_text", tmp_path / "base")
    write_with_peft(build_family_model("qwen3_5_text"), tmp_path / "source", target_modules=["in_proj_qkv"], r=2)
    stored = read_in(tmp_path / "source", tmp_path / "stored", model)
    with pytest.raises(ValueError, match=rf"format={format} has no place for adapters in gated DeltaNets \(layers.0"):
        export_adapter(stored, tmp_path / format, format)


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["qkv_proj"], ["qkv_proj", "gate_up_proj"]], ids="-".join)
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_trained_on_fused_linears_is_merged_as_peft_has_it(
    targets: list[str], use_dora: bool, tmp_path: Path
) -> None:
    base, source, stored = tmp_path / "base", tmp_path / "source", tmp_path / "stored"
    write_family_checkpoint("phi3", base)
    write_with_peft(build_family_model("phi3"), source, target_modules=targets, r=2, use_dora=use_dora)
    words = ["model=hf", f"model.checkpoint={base}"]
    assert run_distributed(call, 1, ["import", *words, f"source={source}", f"output={stored}"]) == [0]
    merge = ["merge", *words, f"adapter={stored}", f"output={tmp_path / 'merged'}", "topology=tp2"]
    assert run_distributed(call, 2, merge) == [0, 0]
    expected = compute_peft_logits(base, source)
    assert (compute_family_logits(tmp_path / "merged", draw_tokens()) - expected).abs().max() < 1e-4
    assert (compute_family_logits(base, draw_tokens()) - expected).abs().max() > 1e-2


def call(words: list[str]) -> int:
    """`lora-dist WORDS` as one process of a job that a launcher started."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


@pytest.mark.parametrize(
    "name",
    [*("llama", "qwen2", "qwen3_moe", "glm4_moe", "minimax_m2", "deepseek_v3"), *exhaustive("qwen3_next")],
)
def test_the_verbs_merge_and_export(name: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = write_family_checkpoint(name, base)
    specs = list_specs(model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    fingerprint = compute_base_fingerprint(model, 0)
    write_adapter_directory(adapter, content, model, {"task": "toy"}, base_fingerprint=fingerprint)
    expected = compute_peft_logits(base, adapter)
    given = ["model=hf", f"model.checkpoint={base}", f"adapter={adapter}"]
    words = ["export", *given, f"output={tmp_path / 'merged'}", "format=hf_merged", "topology=tp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    merged = compute_family_logits(tmp_path / "merged", draw_tokens())
    assert (merged - expected).abs().max() < 1e-5 * expected.abs().max()
    words = ["export", *given, f"output={tmp_path / 'out'}", "format=loralib"]
    if model.architecture.experts:
        assert run_distributed(call, 1, words) == [2]
        return
    assert run_distributed(call, 1, words) == [0]
    settings = json.loads((tmp_path / "out/lora_settings.json").read_text())
    assert settings["model.layers.0.self_attn.k_proj"] == {"r": 3, "lora_alpha": 4.0}


def compute_updates(base: Path) -> dict[str, torch.Tensor]:
    """What the adapters add to each fused linear, from one whole shard."""
    model = read_family_config(base)
    gpt: ShardedGpt = build_shard({}, model)
    specs = list_specs(model)
    values = draw_adapter_values(specs, model, "none")
    for one in apply_lora(gpt, specs, bias="none", seed=0):
        one.parameter.data.copy_(values[one.name])
    names = [
        local_name.removesuffix(".lora") for local_name, module in gpt.named_modules() if module in find_shards(gpt)
    ]
    return dict(zip(names, (compute_update(shard).detach() for shard in find_shards(gpt)), strict=True))


def test_bridges_rows_are_megatrons(tmp_path: Path) -> None:
    model = write_family_checkpoint("llama", tmp_path)
    specs = list_specs(model)
    tensors, settings = to_bridge(draw_adapter_values(specs, model, "none"), specs, model, "none")
    updates = run_distributed(compute_updates, 1, tmp_path)[0]
    assert len(updates) == 4 * model.num_layers
    for name, update in updates.items():
        a, b = (tensors[f"{name}.adapter.linear_{kind}.weight"] for kind in ("in", "out"))
        torch.testing.assert_close(settings["alpha"] / settings["dim"] * b @ a, update)


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    llama = write_family_checkpoint("llama", tmp_path / "llama")
    opt = write_family_checkpoint("opt", tmp_path / "opt")
    write_with_peft(build_family_model("llama"), tmp_path / "source", target_modules=["gate_proj"], r=2)
    with pytest.raises(ValueError, match=r"gate_proj.* is opt, which has no such linear"):
        read_in(tmp_path / "source", tmp_path / "stored", opt)
    assert read_in(tmp_path / "source", tmp_path / "stored", llama).specs[0].target == "gate_proj"


@pytest.mark.parametrize("options", [{"format": "loralib", "alpha": 1.0}, {}], ids=["loralib", "gpt2's"])
def test_what_has_no_like_on_gpt_neox_is_refused(options: dict, tmp_path: Path) -> None:
    model = write_family_checkpoint("gpt_neox", tmp_path / "base")
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2)
    message = (
        "loralib: its MergedLinear has q, k and v of one size"
        if options
        else r"c_attn.* is gpt_neox, which has no such linear"
    )
    with pytest.raises(ValueError, match=message):
        read_in(tmp_path / "source", tmp_path / "stored", model, **options)
