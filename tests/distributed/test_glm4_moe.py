"""Files of GLM-4.5, DeepSeek-V3 and MiniMax-M2: offsets in fp32 among bf16 weights, further layers."""

import json
from pathlib import Path

import pytest
import torch
from family_toy import build_family_model, compute_family_logits, read_family_config, write_family_checkpoint
from hf_toy import build_shard, draw_tokens
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import few_of

from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, read_dtype
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.experts import ExpertMlp
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

EXTRA = "model.layers.4.eh_proj.weight"
OFFSETS = "e_score_correction_bias"
FURTHER = {"minimax_m2": {"use_mtp": True, "num_mtp_modules": 1}}
"""What config.json says of them, where that is not num_nextn_predict_layers."""


def write_published(directory: Path, name: str) -> ModelConfig:
    """bf16 as published, with a layer after the last one; the offsets hold more digits than bf16 has."""
    write_family_checkpoint(name, directory)
    path = directory / "model.safetensors"
    tensors = {
        key: tensor if key.endswith(OFFSETS) else tensor.bfloat16().contiguous()
        for key, tensor in load_file(path).items()
    }
    offsets = [tensor for key, tensor in tensors.items() if key.endswith(OFFSETS)]
    assert offsets
    assert all(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in offsets)
    save_file({**tensors, EXTRA: torch.ones(4, 8, dtype=torch.bfloat16)}, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | FURTHER.get(name, {"num_nextn_predict_layers": 1})))
    return read_family_config(directory)


def load_and_write(options: dict, source: Path, target: Path) -> None:
    gpt = build_shard(options, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=gpt.model, max_shard_bytes=20_000)


@pytest.mark.parametrize(
    "name", few_of(["glm4_moe", "minimax_m2", "deepseek_v3", "deepseek_v32"], "glm4_moe", "minimax_m2", "deepseek_v3")
)
def test_offsets_stay_exact_and_further_layers_are_left_out(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = write_published(source, name)
    check_hf_checkpoint(model, source)
    assert read_dtype(source) == torch.bfloat16
    run_distributed(load_and_write, 4, {"tp_size": 2, "pp_size": 2}, source, target)
    stored = load_file(source / "model.safetensors")
    written = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert written.keys() == stored.keys() - {EXTRA}
    assert all(tensor.dtype == torch.float32 for key, tensor in written.items() if key.endswith(OFFSETS))
    assert all(torch.equal(tensor, stored[key]) for key, tensor in written.items())
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert json.loads((target / "config.json").read_text()).items() >= HF_FAMILIES[name].without_extra.items()
    assert torch.equal(*(compute_family_logits(directory, draw_tokens()) for directory in (source, target)))


def route(source: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of the layers with experts, for tokens drawn: weights and choices, in bf16."""
    gpt = build_shard({}, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    tokens_TH = torch.randn(2048, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    return [module.router(tokens_TH) for module in gpt.modules() if isinstance(module, ExpertMlp)]


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_tokens_go_where_transformers_sends_them(name: str, tmp_path: Path) -> None:
    """In bf16, where a router that rounded its scores or offsets would send some elsewhere."""
    write_published(tmp_path, name)
    theirs = type(build_family_model(name)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens_TH = torch.randn(2048, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    layers = [layer.mlp.gate(tokens_TH) for layer in theirs.model.layers[1:]]
    (ours,) = run_distributed(route, 1, tmp_path)
    for (weights_TC, choices_TC), (_, expected_TC, places_TC) in zip(ours, layers, strict=True):
        order, wanted = choices_TC.argsort(-1), places_TC.argsort(-1)
        assert torch.equal(choices_TC.gather(1, order), places_TC.gather(1, wanted))
        expected_TC = expected_TC.gather(1, wanted).bfloat16()
        torch.testing.assert_close(weights_TC.gather(1, order), expected_TC, rtol=1e-2, atol=0)


def test_what_all_means_and_what_cannot_be_there(tmp_path: Path) -> None:
    model = write_family_checkpoint("glm4_moe", tmp_path)
    targets = {(spec.layer, spec.target) for spec in build_adapter_specs(LoraConfig(target_modules=["all"]), model)}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert {target for layer, target in targets if layer == 0} == attention | mlp
    assert {target for layer, target in targets if layer == 3} == attention | {f"shared_{name}" for name in mlp}
    with pytest.raises(ValueError, match=r"lora.use_dora=true: layers.0.gate_proj has to be a parameter to PEFT"):
        build_adapter_specs(LoraConfig(target_modules=["all"], use_dora=True), model)
    with pytest.raises(ValueError, match=r"layers.1.up_proj is a linear of experts, whose adapters want lora.dropout"):
        build_adapter_specs(LoraConfig(target_modules=["up_proj"], dropout=0.1), model)
    assert len(build_adapter_specs(LoraConfig(target_modules=["shared_up_proj"], dropout=0.1), model)) == 3
