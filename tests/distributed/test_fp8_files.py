"""Checkpoints published in fp8 and int4: their values over shards, quantised again, trained and merged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import ASSETS, call
from family_toy import compute_family_logits, edit_family_config, read_family_config, write_family_checkpoint
from fp8_files import LAYOUTS, Layout, describe_blocks, write_fp8_checkpoint
from hf_toy import build_shard, count_processes, draw_adapter_values, draw_tokens
from processes import run_distributed
from safetensors import safe_open
from safetensors.torch import load_file
from test_families import EVERY_SPLIT, load_compute_and_write
from tiers import exhaustive, few_of

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files import hf_reader
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, read_dtype, read_model_fields
from lora_dist.files.safetensors_stream import TensorInfo, read_header
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import describe_weights
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

CASES = [
    ("deepseek_v3", {}, (8, 8)),
    ("deepseek_v3", {"tp_size": 4}, (7, 5)),
    ("deepseek_v3", EVERY_SPLIT, (128, 128)),
    ("deepseek_v3_direct", EVERY_SPLIT, (5, 7)),
    ("qwen3", {"tp_size": 4}, (5, 7)),
    ("phi3", EVERY_SPLIT, (9, 7)),
    *((name, {"tp_size": 2}, (9, 7)) for name in ("mixtral", "gemma3_text", "opt", "gpt_neox")),
    *exhaustive(
        ("qwen3", {"pp_size": 3}, (16, 16)),
        ("qwen3_moe", EVERY_SPLIT, (7, 5)),
        ("qwen3_next", {"tp_size": 4}, (9, 7)),
        ("qwen3_5_moe_text", EVERY_SPLIT, (5, 7)),
        ("glm4_moe", {"tp_size": 4}, (3, 128)),
        ("deepseek_v32", {"tp_size": 4}, (7, 5)),
        ("glm_moe_dsa", EVERY_SPLIT, (7, 5)),
        *((name, {"tp_size": 2}, (9, 7)) for name in ("llama", "qwen2")),
    ),
    ("deepseek_v3", {"tp_size": 4}, "compressed_row"),
    ("llama", {"tp_size": 2}, "compressed_tensor"),
    ("qwen3_moe", EVERY_SPLIT, "int4_and_fp8"),
    ("qwen2", {"tp_size": 2}, "mistral"),
    ("minimax_m2", EVERY_SPLIT, "minimax"),
    *exhaustive(
        ("glm4_moe", EVERY_SPLIT, "compressed_row"),
        ("qwen3_moe", {"tp_size": 2}, "compressed_block"),
        ("phi3", {"tp_size": 2}, "compressed_weights_alone"),
        ("llama", {"tp_size": 4}, "int4"),
        ("deepseek_v3", {"tp_size": 4}, "int4_experts"),
        ("llama", {"tp_size": 2}, "fbgemm"),
        ("mixtral", {"tp_size": 2}, "autofp8"),
        ("phi3", {"tp_size": 2}, "autofp8_dynamic"),
    ),
]


@pytest.mark.parametrize(("name", "options", "layout"), CASES, ids=str)
def test_logits_and_files_are_those_of_the_values(
    name: str, options: dict, layout: str | tuple[int, int], tmp_path: Path
) -> None:
    """Shards that begin inside blocks, weights that end inside one, weights smaller than one."""
    source, fp8, plain, target = (tmp_path / part for part in ("source", "fp8", "plain", "target"))
    model = write_family_checkpoint(name, source)
    written_as = LAYOUTS[layout] if isinstance(layout, str) else describe_blocks(layout)
    values = write_fp8_checkpoint(source, fp8, plain, layout=written_as)
    check_hf_checkpoint(model, fp8)
    expected = compute_family_logits(plain, draw_tokens())
    assert (expected - compute_family_logits(source, draw_tokens())).abs().max() > 0.01
    results = run_distributed(load_compute_and_write, count_processes(options), options, fp8, target)
    logits = [result for result in results if result is not None]
    assert logits
    for actual in logits:
        assert (actual - expected).abs().max() < 1e-4
    written = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert written.keys() == values.keys()
    assert all(torch.equal(written[key], value) for key, value in values.items())
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert torch.equal(compute_family_logits(target, draw_tokens()), expected)


@pytest.mark.parametrize("layout", [describe_blocks((4, 4)), LAYOUTS["mistral"]], ids=["blocks", "tensor"])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa", "qwen3", "qwen3_moe", *exhaustive("qwen3_next")])
def test_transformers_reads_the_same_values(name: str, layout: Layout, tmp_path: Path) -> None:
    """Where blocks divide every weight, which its dequantisation on a CPU wants."""
    source, fp8, plain, target = (tmp_path / part for part in ("source", "fp8", "plain", "target"))
    write_family_checkpoint(name, source)
    write_fp8_checkpoint(source, fp8, plain, layout=layout)
    expected = compute_family_logits(fp8, draw_tokens())
    assert (expected - compute_family_logits(source, draw_tokens())).abs().max() > 0.01
    (actual,) = run_distributed(load_compute_and_write, 1, {}, fp8, target)
    assert (actual - expected).abs().max() < 1e-4


def load_and_write(options: dict, source: Path, target: Path) -> None:
    gpt = build_shard(options, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=gpt.model)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_values_are_rounded_once_to_the_dtype_of_the_model(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    source, fp8, plain, target = (tmp_path / part for part in ("source", "fp8", "plain", "target"))
    write_family_checkpoint("deepseek_v3", source)
    options = {"scale_dtype": scale_dtype, "dtype": torch.bfloat16}
    values = write_fp8_checkpoint(source, fp8, plain, block_size=(8, 12), **options)
    assert read_dtype(fp8) == torch.bfloat16
    run_distributed(load_and_write, 2, {"tp_size": 2}, fp8, target)
    written = load_file(target / "model.safetensors")
    assert written.keys() == values.keys()
    for name, value in values.items():
        kept = value if "correction_bias" in name else value.bfloat16()
        assert torch.equal(written[name], kept), name
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def measure_reading(options: dict, directory: Path) -> tuple[int, int]:
    """Bytes of weights in fp8 and of their scales that were read."""
    weights, scales, real = 0, 0, hf_reader.read_part
    headers = [read_header(file).items() for file in directory.glob("*.safetensors")]
    infos_of_scales = {info for header in headers for name, info in header if name.endswith("_scale_inv")}

    def counted(info: TensorInfo, **options: Any) -> torch.Tensor:
        nonlocal weights, scales
        part = real(info, **options)
        weights += part.nbytes if info.dtype == "F8_E4M3" else 0
        scales += part.nbytes if info in infos_of_scales else 0
        return part

    hf_reader.read_part = counted
    load_hf_checkpoint(build_shard(options, read_family_config(directory)), directory)
    hf_reader.read_part = real
    return weights, scales


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_processes_read_a_weight_once_between_them(name: str, tmp_path: Path) -> None:
    source, fp8, plain = (tmp_path / part for part in ("source", "fp8", "plain"))
    write_family_checkpoint(name, source)
    write_fp8_checkpoint(source, fp8, plain, block_size=(2, 2))
    stored = {key: tensor for file in fp8.glob("*.safetensors") for key, tensor in load_file(file).items()}
    read = run_distributed(measure_reading, 4, {"tp_size": 2, "pp_size": 2}, fp8)
    assert sum(weights for weights, _ in read) == sum(one.nbytes for one in stored.values() if one.itemsize == 1)
    assert sum(scales for _, scales in read) == sum(one.nbytes for key, one in stored.items() if "_scale_" in key)


def quantize_again(model: ModelConfig, *directories: Path) -> list[dict[str, torch.Tensor]]:
    """What the same shard holds after it is filled from each directory."""
    gpt, held = build_shard({"tp_size": 2}, model), []
    quantized = [one for one in describe_weights(gpt) if one.quantized is not None]
    for directory in directories:
        load_hf_checkpoint(gpt, directory)
        held.append({one.name: one.quantized.dequantize(torch.float32).clone() for one in quantized})
    return held


@pytest.mark.parametrize("base_format", ["nf4_double", "fp8"])
def test_a_quantised_base_is_made_of_the_exact_values(base_format: str, tmp_path: Path) -> None:
    """Of a GPT-2, whose linears are stored the other way round."""
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    write_fp8_checkpoint(ASSETS / "demo_base", fp8, plain, block_size=(128, 128))
    model = replace(ModelConfig(**read_model_fields(fp8)), base_format=base_format)
    for ours, expected in run_distributed(quantize_again, 2, model, fp8, plain):
        assert len(expected) == 4 * model.num_layers
        assert all(torch.equal(ours[name], value) for name, value in expected.items())
        assert all(value.abs().max() > 0.1 for value in expected.values())


@pytest.mark.parametrize("base_format", few_of(["nf4", "fp8"], "fp8"))
def test_what_is_merged_is_rounded_once(base_format: str, tmp_path: Path) -> None:
    """What trained is what the format makes of the exact values, not of their rounding to the file's 16 bits."""
    fp8, adapter = tmp_path / "fp8", tmp_path / "adapter"
    write_fp8_checkpoint(ASSETS / "demo_base", fp8, tmp_path / "plain", block_size=(128, 128), dtype=torch.bfloat16)
    model = ModelConfig(**read_model_fields(fp8))
    specs = build_adapter_specs(LoraConfig(rank=2, target_modules=["v_proj", "down_proj"]), model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(adapter, content, model, {}, base_fingerprint=compute_base_fingerprint(model, 0))
    words = ["merge", "model=hf", f"model.checkpoint={fp8}", f"model.base_format={base_format}", "topology=tp2"]
    for dtype in ("bf16", "fp32"):
        output = [f"adapter={adapter}", f"output={tmp_path / dtype}", f"dtype={dtype}"]
        assert run_distributed(call, 2, [*words, *output]) == [0, 0]
    rounded, exact = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("bf16", "fp32"))
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in exact.items())
    native = load_file(tmp_path / "plain" / "model.safetensors")
    changed = [name for name, value in exact.items() if not torch.equal(native[name], value)]
    assert len(changed) == 4 * model.num_layers


def test_it_is_trained_and_merged_as_peft_does(tmp_path: Path) -> None:
    source, fp8, plain = (tmp_path / part for part in ("source", "fp8", "plain"))
    write_family_checkpoint("qwen3_moe", source)
    write_fp8_checkpoint(source, fp8, plain, block_size=(8, 8), dtype=torch.bfloat16)
    run, words = tmp_path / "run", ["model=hf", f"model.checkpoint={fp8}"]
    data = ["data=fake", "data.seq_len=16", "data.num_fake_examples=8", "lora.target_modules=[all]", "optim.lr=0.1"]
    data += ["loop.num_steps=2", "loop.micro_batch_size=1", "loop.global_batch_size=2", "track=none"]
    assert run_distributed(call, 2, ["train", *words, *data, "topology=tp2", f"run_dir={run}"]) == [0, 0]
    merge = ["merge", *words, f"adapter={run / 'adapter'}", f"output={tmp_path / 'merged'}"]
    assert run_distributed(call, 1, merge) == [0]
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    before = base.eval()(draw_tokens()).logits.detach()
    expected = PeftModel.from_pretrained(base, run / "adapter").eval()(draw_tokens()).logits.detach()
    merged = compute_family_logits(tmp_path / "merged", draw_tokens())
    assert (expected - before).abs().max() > 0.1 * before.abs().max()
    assert (merged - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_kimi_k2_is_a_deepseek_with_its_own_name_and_code(tmp_path: Path) -> None:
    source, fp8, plain, target = (tmp_path / part for part in ("source", "fp8", "plain", "target"))
    write_family_checkpoint("deepseek_v3", source)
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 1.0, "beta_slow": 1.0}
    rope = {"rope_parameters": "gone", "rope_scaling": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}}
    edit_family_config(source, **rope, rope_theta=100.0)
    write_fp8_checkpoint(source, fp8, plain, block_size=(7, 5))
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    edit_family_config(fp8, model_type="kimi_k2", auto_map=code)
    for name in ("configuration_deepseek.py", "tiktoken.model"):
        (fp8 / name).write_text(f"raise RuntimeError('{name} was run')")
    assert read_family_config(fp8).family == "deepseek_v3"
    check_hf_checkpoint(read_family_config(fp8), fp8)
    expected = compute_family_logits(plain, draw_tokens())
    (actual,) = run_distributed(load_compute_and_write, 1, {}, fp8, target)
    assert (actual - expected).abs().max() < 1e-4
    read, written = (json.loads((directory / "config.json").read_text()) for directory in (fp8, target))
    decided = {"dtype": "float32", "num_nextn_predict_layers": 0}
    assert written == {key: value for key, value in read.items() if key != "quantization_config"} | decided
    for name in ("configuration_deepseek.py", "tiktoken.model"):
        assert (target / name).read_text() == (fp8 / name).read_text()
    edit_family_config(target, model_type="deepseek_v3", auto_map="gone")
    assert torch.equal(compute_family_logits(target, draw_tokens()), expected)
