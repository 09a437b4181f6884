"""Checkpoints with a layer's experts in one tensor: read as those of single experts, and written as they were."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_runs import call
from family_models import FAMILIES
from family_toy import build_family_model, compute_family_logits, read_family_config
from fp8_files import describe_blocks, quantize
from hf_toy import build_shard, compute_logits, count_processes, draw_adapter_values
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import exhaustive, few_of
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM
from wrapper_toy import build_wrapper, draw_words, look, open_whole

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, read_dtype
from lora_dist.files.hf_reader import HfReader
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

STACKED = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe", "minimax_m2", "deepseek_v3")
SPARSE = ("deepseek_v32", "glm_moe_dsa")
TOPOLOGIES = [{}, {"tp_size": 2}, {"tp_size": 2, "pp_size": 2}]
UP = "model.layers.1.mlp.experts.gate_up_proj"


def write_both(model: PreTrainedModel, single: Path, stacked: Path) -> None:
    """transformers' own files of either kind."""
    model.save_pretrained(single)
    model.save_pretrained(stacked, save_original_format=False)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in actual.items())


def load_and_write(
    options: dict, source: Path, target: Path | None, base_format: str = "native"
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """What this rank holds after reading, and logits."""
    model = replace(read_family_config(source), base_format=base_format)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    if target is not None:
        write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=20_000)
    return {name: one.clone() for name, one in gpt.state_dict().items() if one is not None}, compute_logits(
        gpt, draw_words()
    )


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("family", few_of((*STACKED, *SPARSE), *STACKED[:1], *STACKED[3:6]))
def test_what_is_read_is_that_of_single_experts(family: str, options: dict, tmp_path: Path) -> None:
    single, stacked, target = (tmp_path / name for name in ("single", "stacked", "target"))
    write_both(build_family_model(family), single, stacked)
    model = read_family_config(stacked)
    check_hf_checkpoint(model, stacked)
    assert model.stacked_experts == "out_in"
    assert read_dtype(stacked) == torch.float32
    expected, num_processes = compute_family_logits(stacked, draw_words()), count_processes(options)
    of_single = run_distributed(load_and_write, num_processes, options, single, None)
    of_stacked = run_distributed(load_and_write, num_processes, options, stacked, target)
    for (held, logits), (held_of_single, _) in zip(of_stacked, of_single, strict=True):
        assert_same(held, held_of_single)
        if logits is not None:
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert_same(read_all(target), read_all(stacked))


@pytest.mark.parametrize("base_format", ["fp8", *exhaustive("nf4", "mxfp4")])
def test_a_base_is_quantised_the_same(base_format: str, tmp_path: Path) -> None:
    single, stacked = tmp_path / "single", tmp_path / "stacked"
    config = FAMILIES["qwen3_moe"]().config
    config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.head_dim = 16  # so that each TP rank has whole blocks of all inputs
    torch.manual_seed(0)
    write_both(Qwen3MoeForCausalLM(config), single, stacked)
    of_single, of_stacked = (
        run_distributed(load_and_write, 2, {"tp_size": 2}, source, None, base_format) for source in (single, stacked)
    )
    for (held, logits), (expected, expected_logits) in zip(of_stacked, of_single, strict=True):
        assert_same(held, expected)
        assert torch.equal(logits, expected_logits)


def write_published(name: str, directory: Path) -> None:
    """Under the names, and the way round, of the published files."""
    build_wrapper(name).save_pretrained(directory, save_original_format=False)
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key and name == "qwen3_vl_moe"]:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()
    mtp = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 48, 32)}
    save_file(tensors | (mtp if name == "qwen3_5_moe" else {}), directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_size": 2, "pp_size": 2}], ids=str)
@pytest.mark.parametrize(("name", "order"), [("qwen3_5_moe", "out_in"), ("qwen3_vl_moe", "in_out")])
def test_a_model_that_sees_pictures_is_written_as_published(
    name: str, order: str, options: dict, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_published(name, source)
    shape = load_file(source / "model.safetensors")["model.language_model.layers.1.mlp.experts.gate_up_proj"].shape
    assert shape == ((4, 48, 32) if order == "out_in" else (4, 32, 48))
    model = read_family_config(source)
    check_hf_checkpoint(model, source)
    assert model.stacked_experts == order
    with torch.no_grad():
        expected = build_wrapper(name)(input_ids=draw_words()).logits
        assert torch.equal(open_whole(source)(input_ids=draw_words()).logits, expected)
    for _, logits in run_distributed(load_and_write, count_processes(options), options, source, target):
        if logits is not None:
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_same(read_all(target), read_all(source))
    assert torch.equal(look(open_whole(target), name), look(open_whole(source), name))


def train_adapter(base: Path, run_dir: Path, topology: str) -> Path:
    """On experts and attention, two steps."""
    words = ["train", "model=hf", f"model.checkpoint={base}", f"topology={topology}", f"run_dir={run_dir}"]
    lora = ["lora.rank=2", "lora.target_modules=[q_proj,gate_proj,down_proj]", "optim.lr=1e-1", "track=none"]
    sizes = ["data=fake", "data.seq_len=16", "loop.num_steps=2", "loop.micro_batch_size=2", "loop.global_batch_size=4"]
    assert set(run_distributed(call, 1 if topology == "single" else 2, [*words, *lora, *sizes])) == {0}
    return run_dir / "adapter"


@pytest.mark.parametrize("topology", ["single", *exhaustive("tp2", "pp2")])
def test_what_is_trained_is_that_of_single_experts(topology: str, tmp_path: Path) -> None:
    single, stacked = tmp_path / "single", tmp_path / "stacked"
    write_both(build_family_model("qwen3_5_moe_text"), single, stacked)
    one, other = (train_adapter(base, tmp_path / f"run_{base.name}", topology) for base in (single, stacked))
    factors = load_file(other / "adapter_model.safetensors")
    assert all(factor.abs().max() > 0 for factor in factors.values())
    assert_same(factors, load_file(one / "adapter_model.safetensors"))


@torch.no_grad()
def test_what_is_merged_is_what_peft_computes_and_stacked_again(tmp_path: Path) -> None:
    from peft import PeftModel

    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    write_both(build_family_model("qwen3_5_moe_text"), tmp_path / "single", base)
    model = read_family_config(base)
    specs = build_adapter_specs(LoraConfig(rank=2, target_modules=["v_proj", "gate_proj", "down_proj"]), model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(adapter, content, model, {}, base_fingerprint=compute_base_fingerprint(model, 0))
    words = ["merge", "model=hf", f"model.checkpoint={base}", f"adapter={adapter}", f"output={merged}", "topology=tp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    assert read_all(merged).keys() == read_all(base).keys()
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    logits, theirs, unmerged = (
        compute_family_logits(merged, draw_words()),
        expected.eval()(input_ids=draw_words()).logits,
        compute_family_logits(base, draw_words()),
    )
    assert (logits - theirs).abs().max() < 1e-4 * theirs.abs().max() < 0.1 * (unmerged - theirs).abs().max()


def write_in_fp8(directory: Path) -> dict[str, torch.Tensor]:
    """Stacks in blocks, under the names that transformers gives them and their scales; the values."""
    build_family_model("qwen3_5_moe_text").save_pretrained(directory, save_original_format=False)
    values = load_file(directory / "model.safetensors")
    stored = dict(values)
    for name in [name for name in values if ".experts." in name]:
        parts = [quantize(one, (7, 9), torch.float32) for one in values[name]]
        stored[name], stored[f"{name}_scale_inv"], values[name] = (torch.stack(one) for one in zip(*parts, strict=True))
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    settings = {"dtype": "float32", "quantization_config": describe_blocks((7, 9)).settings}
    (directory / "config.json").write_text(json.dumps(config | settings))
    return values


def test_stacks_in_fp8_are_read_by_slices(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    values = write_in_fp8(source)
    check_hf_checkpoint(read_family_config(source), source)
    assert torch.equal(HfReader(source).read(UP), values[UP])
    run_distributed(load_and_write, 2, {"tp_size": 2}, source, target)
    assert_same(read_all(target), values)
