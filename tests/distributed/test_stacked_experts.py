"""Checkpoints with a layer's experts in one tensor: read as those of single experts, and written as they were."""

import json
from pathlib import Path

import pytest
import torch
from demo_runs import call
from family_toy import build_family_model, compute_family_logits, read_family_config
from fp8_files import describe_blocks, quantize
from hf_toy import build_shard, compute_logits, count_processes, draw_tokens
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import few_of
from wrapper_toy import build_wrapper, draw_words, look, open_whole

from lora_dist.files.hf_checkpoint import check_hf_checkpoint, read_dtype
from lora_dist.files.hf_reader import HfReader
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

STACKED = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe", "minimax_m2", "deepseek_v3")
SPARSE = ("deepseek_v32", "glm_moe_dsa")
TOPOLOGIES = [{}, {"tp_size": 2}, {"tp_size": 2, "pp_size": 2}]
UP = "model.layers.1.mlp.experts.gate_up_proj"


def write_both(family: str, single: Path, stacked: Path) -> None:
    """transformers' own files of either kind, of the same model."""
    model = build_family_model(family)
    model.save_pretrained(single)
    model.save_pretrained(stacked, save_original_format=False)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in actual.items())


def load_twice_and_write(
    options: dict, single: Path, stacked: Path, target: Path, base_format: str = "native"
) -> tuple[bool, torch.Tensor | None]:
    """Whether every value of the shard is the same out of both; logits of the stacked one."""
    both = []
    for source in (single, stacked):
        model = read_family_config(source)
        model.base_format = base_format
        both.append(build_shard(options, model))
        load_hf_checkpoint(both[-1], source)
    if base_format == "native":
        write_hf_checkpoint(both[1], target, model=both[1].model, max_shard_bytes=20_000)
    one, other = ({**dict(gpt.named_parameters()), **dict(gpt.named_buffers())} for gpt in both)
    return all(torch.equal(value, other[name]) for name, value in one.items()), compute_logits(both[1])


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("family", few_of((*STACKED, *SPARSE), *STACKED[:1], *STACKED[3:6]))
def test_what_is_read_is_that_of_single_experts(family: str, options: dict, tmp_path: Path) -> None:
    single, stacked, target = (tmp_path / name for name in ("single", "stacked", "target"))
    write_both(family, single, stacked)
    model = read_family_config(stacked)
    check_hf_checkpoint(model, stacked)
    assert model.stacked_experts == "out_in"
    assert read_dtype(stacked) == torch.float32
    expected = compute_family_logits(stacked, draw_tokens())
    for is_same, logits in run_distributed(
        load_twice_and_write, count_processes(options), options, single, stacked, target
    ):
        assert is_same
        if logits is not None:
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert_same(read_all(target), read_all(stacked))
    assert torch.equal(compute_family_logits(target, draw_tokens()), expected)


@pytest.mark.parametrize("base_format", ["nf4", "fp8", "mxfp4"])
def test_a_base_is_quantised_the_same(base_format: str, tmp_path: Path) -> None:
    single, stacked = tmp_path / "single", tmp_path / "stacked"
    write_both("qwen3_5_moe_text", single, stacked)
    paths = (single, stacked, tmp_path / "target", base_format)
    assert all(is_same for is_same, _ in run_distributed(load_twice_and_write, 2, {"tp_size": 2}, *paths))


def write_published(name: str, directory: Path) -> None:
    """Under the names, and the way round, of the published files."""
    build_wrapper(name).save_pretrained(directory, save_original_format=name == "qwen3_vl_moe")
    tensors = load_file(directory / "model.safetensors")
    mtp = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 48, 32)}
    save_file(tensors | (mtp if name == "qwen3_5_moe" else {}), directory / "model.safetensors", {"format": "pt"})


def load_and_write(options: dict, source: Path, target: Path) -> torch.Tensor | None:
    model = read_family_config(source)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=20_000)
    return compute_logits(gpt, draw_words())


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
    for logits in run_distributed(load_and_write, count_processes(options), options, source, target):
        if logits is not None:
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_same(read_all(target), read_all(source))
    if name == "qwen3_vl_moe":
        assert torch.equal(look(open_whole(target), name), look(open_whole(source), name))


@pytest.mark.parametrize("topology", ["single", "tp2", "pp2"])
def test_what_is_trained_is_that_of_single_experts(topology: str, tmp_path: Path) -> None:
    """Adapters on experts, their factors after three steps, and what is merged of them, bit for bit."""
    written = []
    write_both("qwen3_5_moe_text", tmp_path / "single", tmp_path / "stacked")
    for kind in ("single", "stacked"):
        base, run_dir, merged = tmp_path / kind, tmp_path / f"run_{kind}", tmp_path / f"merged_{kind}"
        words = ["model=hf", f"model.checkpoint={base}", f"topology={topology}"]
        lora = ["lora.rank=2", "lora.target_modules=[q_proj,gate_proj,down_proj]", "optim.lr=1e-1"]
        sizes = ["data=fake", "data.seq_len=16", "loop.num_steps=3", "loop.micro_batch_size=2"]
        train = ["train", *words, *lora, *sizes, "loop.global_batch_size=4", "track=none", f"run_dir={run_dir}"]
        num_processes = 1 if topology == "single" else 2
        assert set(run_distributed(call, num_processes, train)) == {0}
        merge = ["merge", *words, f"adapter={run_dir / 'adapter'}", f"output={merged}"]
        assert set(run_distributed(call, num_processes, merge)) == {0}
        written.append((load_file(run_dir / "adapter" / "adapter_model.safetensors"), merged, base))
    (single, merged_single, base), (stacked, merged_stacked, _) = written
    assert all(one.abs().max() > 0 for one in stacked.values())
    assert_same(stacked, single)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_all(merged_stacked)
    logits, unmerged = (compute_family_logits(one, draw_tokens()) for one in (merged_stacked, base))
    assert torch.equal(logits, compute_family_logits(merged_single, draw_tokens()))
    assert (logits - unmerged).abs().max() > 1e-3 * unmerged.abs().max()


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
