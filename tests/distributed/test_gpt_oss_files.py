"""gpt-oss: routing in bf16 as transformers routes, and experts' weights in MXFP4, read as published."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_runs import call
from family_toy import build_family_model, compute_family_logits, read_family_config, write_family_checkpoint
from hf_toy import build_shard, compute_logits, count_processes, draw_adapter_values, draw_tokens
from mxfp4_files import edit_quantization, write_published
from processes import run_distributed
from safetensors.torch import load_file, save_file
from test_family_adapters import compute_peft_logits

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, read_dtype
from lora_dist.lora.function import read_weight
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.experts import ExpertLinears, ExpertMlp
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint


def route(source: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, for tokens drawn: weights and choices, in bf16."""
    gpt = build_shard({}, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    return [module.router(draw_router_tokens()) for module in gpt.modules() if isinstance(module, ExpertMlp)]


def draw_router_tokens() -> torch.Tensor:
    return torch.randn(2048, 32, generator=torch.Generator().manual_seed(5)).bfloat16()


def test_tokens_go_where_transformers_sends_them(tmp_path: Path) -> None:
    """Its weights are rounded to bf16 within the softmax, ours once, at the end."""
    write_family_checkpoint("gpt_oss", tmp_path, dtype=torch.bfloat16)
    theirs = type(build_family_model("gpt_oss")).from_pretrained(tmp_path, dtype=torch.bfloat16)
    (ours,) = run_distributed(route, 1, tmp_path)
    for layer, (weights_TC, choices_TC) in zip(theirs.model.layers, ours, strict=True):
        logits_TE, expected_TC, _ = layer.mlp.router(draw_router_tokens())
        # Of equal logits either may be taken: what counts is that none that is left out is larger.
        picked_TC = logits_TE.gather(1, choices_TC)
        assert torch.equal(picked_TC.sort(-1).values, logits_TE.topk(2).values.sort(-1).values)
        torch.testing.assert_close(weights_TC.sort(-1).values, expected_TC.sort(-1).values, rtol=1e-2, atol=0)


def load_compute_and_write(options: dict, source: Path, target: Path) -> tuple[dict, torch.Tensor | None]:
    """What this rank has read, and logits in fp32."""
    model = read_family_config(source)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=200_000)
    return {name: parameter.clone() for name, parameter in gpt.named_parameters()}, compute_logits(gpt)


@pytest.mark.parametrize("options", [{}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 2}], ids=str)
def test_weights_in_mxfp4_are_read_as_published(options: dict, tmp_path: Path) -> None:
    """Every value, by slices too that end within a block; what is written has them in transformers' own layout."""
    published, plain, target = (tmp_path / name for name in ("published", "plain", "target"))
    values = write_published(published, plain)
    check_hf_checkpoint(read_family_config(published), published)
    assert read_dtype(published) == torch.bfloat16
    num_processes = count_processes(options)
    results = run_distributed(load_compute_and_write, num_processes, options, published, target)
    for (mine, logits), (expected, _) in zip(
        results,
        run_distributed(load_compute_and_write, num_processes, options, plain, tmp_path / "again"),
        strict=True,
    ):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.items())
        if logits is not None:
            theirs = compute_family_logits(published, draw_tokens())  # transformers dequantises too
            assert (logits - theirs).abs().max() < 1e-4 * theirs.abs().max()
    written = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert written.keys() == values.keys()
    assert all(torch.equal(written[name], value.float()) for name, value in values.items())
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def read_experts(options: dict, source: Path) -> tuple[list[torch.Tensor], int, torch.Tensor | None]:
    """This rank's experts' weights in bf16, their bytes as they are held, and logits."""
    model = replace(read_family_config(source), **options.pop("model", {}))
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    weights = [module.weight for module in gpt.modules() if isinstance(module, ExpertLinears)]
    values = [read_weight(weight, torch.bfloat16).clone() for weight in weights]
    return values, sum(weight.nbytes for weight in weights), compute_logits(gpt)


def test_a_base_in_mxfp4_is_the_published_one(tmp_path: Path) -> None:
    """Every value, in 4.25 bits; attention, which is published in bf16, stays native."""
    published = tmp_path / "published"
    write_published(published, tmp_path / "plain")
    packed, native = (
        run_distributed(read_experts, 2, {"tp_size": 2, "model": {"base_format": name}}, published)
        for name in ("mxfp4", "native")
    )
    for (mine, num_bytes, logits), (expected, native_bytes, expected_logits) in zip(packed, native, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, expected, strict=True))
        assert num_bytes / native_bytes == 4.25 / 32
        assert torch.equal(logits, expected_logits)


def test_a_merged_model_is_in_bf16(tmp_path: Path) -> None:
    """Adapters on experts over the published files: what `merge` writes, and what PEFT has beside the base."""
    published, plain, adapter, merged = (tmp_path / name for name in ("published", "plain", "adapter", "merged"))
    write_published(published, plain)
    model = read_family_config(published)
    specs = build_adapter_specs(LoraConfig(rank=2, target_modules=["v_proj", "gate_proj", "down_proj"]), model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(adapter, content, model, {}, base_fingerprint=compute_base_fingerprint(model, 0))
    words = ["merge", "model=hf", f"model.checkpoint={published}", f"adapter={adapter}", f"output={merged}"]
    assert run_distributed(call, 2, [*words, "topology=tp2", "dtype=bf16"]) == [0, 0]
    stored = {key: one for file in merged.glob("*.safetensors") for key, one in load_file(file).items()}
    assert {one.dtype for one in stored.values()} == {torch.bfloat16}
    expected, base = compute_peft_logits(plain, adapter), compute_family_logits(plain, draw_tokens())
    actual = compute_family_logits(merged, draw_tokens())
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max() < 0.1 * (base - expected).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales", r"gate_up_proj_blocks is in MXFP4 without model.layers.0.mlp.experts.gate_up_proj_scales; copy"),
        ("shape", r"down_proj_blocks has shape \(4, 64, 2, 15\) and model.layers.0.mlp.experts.down_proj_scales has"),
        ("dtype", r"down_proj_scales is I8, but MXFP4 is stored as U8"),
        ("config", r"down_proj in MXFP4, of which the quantization_config in config.json says nothing; copy conf"),
        ("method", r"quantization_config with quant_method='gptq' is not supported, only 'fp8'"),
    ],
)
def test_what_does_not_fit_is_named(change: str, message: str, tmp_path: Path) -> None:
    published = tmp_path / "published"
    write_published(published, tmp_path / "plain")
    model, path = read_family_config(published), published / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.experts.down_proj"
    if change == "scales":
        del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    elif change == "shape":
        tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"][..., :15].contiguous()
    elif change == "dtype":
        tensors[f"{name}_scales"] = tensors[f"{name}_scales"].to(torch.int8)
    else:
        edit_quantization(published, None if change == "config" else {"quant_method": "gptq"})
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        check_hf_checkpoint(model, published)
