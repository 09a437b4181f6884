"""DeepSeek-V3.2 and GLM-5: exact up to the positions that indexers pick, which go whole into what is written; longer
rows are in `test_long_rows.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from demo_runs import ASSETS, call
from family_toy import build_family_model, edit_family_config, read_family_config, write_family_checkpoint
from fp8_files import write_fp8_checkpoint
from hf_toy import VOCAB_SIZE, build_shard, compute_logits, count_processes, draw_adapter_values
from latent_toy import ATTENDED
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import few_of
from transformers import AutoModelForCausalLM

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig
from lora_dist.files.carried import CarriedTensors
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, read_dtype
from lora_dist.generation_config import check_room
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

NAMES = ["deepseek_v32", "glm_moe_dsa"]
LONG, POSITIONS = 48, 64
"""More positions than the indexers pick, and all that there are."""


def draw_tokens(num_positions: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, num_positions), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def compute_theirs(directory: Path, num_positions: int = LONG) -> torch.Tensor:
    """[B, S, V] of transformers, which finds every tensor in the files and knows each of them."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(found.values()), found
    return model.eval()(draw_tokens(num_positions)).logits


def compute_ours(options: dict, source: Path, dtype: torch.dtype) -> torch.Tensor | None:
    gpt = build_shard(options, read_family_config(source), dtype)
    load_hf_checkpoint(gpt, source)
    return compute_logits(gpt, draw_tokens(ATTENDED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_up_to_the_picked_positions_logits_are_those_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_family_checkpoint(name, tmp_path)
    with torch.no_grad():
        expected = build_family_model(name).to(dtype)(draw_tokens(ATTENDED)).logits
    options = {"tp_size": 2, "sequence_parallel": True}
    for logits in run_distributed(compute_ours, count_processes(options), options, tmp_path, dtype):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()  # transformers' norms are fp32 in both


def spoil_indexers(source: Path, target: Path) -> None:
    """A copy whose indexers pick other positions."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    spoilt = {key: -one if "weights_proj" in key else one for key, one in tensors.items()}
    save_file(spoilt, target / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def compute_with_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.eval()(draw_tokens(LONG)).logits


@pytest.mark.parametrize("name", few_of(NAMES, "glm_moe_dsa"))
def test_what_is_merged_is_the_whole_model_for_longer_contexts_too(name: str, tmp_path: Path) -> None:
    base, adapter, merged, spoilt = (tmp_path / part for part in ("base", "adapter", "merged", "spoilt"))
    model = write_family_checkpoint(name, base)
    specs = build_adapter_specs(LoraConfig(rank=3, target_modules=["all"]), model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    fingerprint = compute_base_fingerprint(model, 0)
    write_adapter_directory(adapter, content, model, {"task": "toy"}, base_fingerprint=fingerprint)
    words = ["merge", "model=hf", f"model.checkpoint={base}", f"adapter={adapter}", f"output={merged}", "topology=tp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    expected, actual = compute_with_peft(base, adapter), compute_theirs(merged)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()  # merged weights are rounded
    assert (compute_theirs(base) - expected).abs().max() > 0.1
    spoil_indexers(merged, spoilt)
    error = (compute_theirs(spoilt) - actual).abs().amax(dim=(0, 2))
    assert error[:ATTENDED].max() < 1e-5  # experts have other rows beside them
    assert error[ATTENDED:].max() > 0.1


def load_and_write(options: dict, source: Path, target: Path) -> None:
    gpt = build_shard(options, read_family_config(source), torch.bfloat16)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=gpt.model, max_shard_bytes=20_000)


@pytest.mark.parametrize("name", few_of(NAMES, "deepseek_v32"))
def test_what_is_published_in_fp8_keeps_its_fp32_and_loses_the_layer_after_the_last(name: str, tmp_path: Path) -> None:
    source, fp8, plain, target = (tmp_path / part for part in ("source", "fp8", "plain", "target"))
    write_family_checkpoint(name, source)
    values = write_fp8_checkpoint(source, fp8, plain, block_size=(5, 7), dtype=torch.bfloat16)
    norms = {key: one.float() * 1.001 for key, one in values.items() if ".indexer.k_norm." in key}
    extra = {"model.layers.4.self_attn.indexer.wk.weight": torch.ones(8, 32, dtype=torch.bfloat16)}
    save_file(norms | extra, fp8 / "model-00003-of-00003.safetensors")
    for path in fp8.glob("model-0000[12]*"):
        kept = {key: one for key, one in load_file(path).items() if key not in norms}
        save_file(kept, path)
    index = json.loads((fp8 / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(norms | extra, "model-00003-of-00003.safetensors")
    (fp8 / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_family_config(fp8, num_nextn_predict_layers=1)
    model = read_family_config(fp8)
    check_hf_checkpoint(model, fp8)
    assert read_dtype(fp8) == torch.bfloat16
    run_distributed(load_and_write, 4, {"tp_size": 2, "pp_size": 2}, fp8, target)
    written = {key: one for path in target.glob("*.safetensors") for key, one in load_file(path).items()}
    assert written.keys() == values.keys()
    for key, value in (values | norms).items():
        kept = value if key in norms or "correction_bias" in key else value.bfloat16()
        assert written[key].dtype == kept.dtype, key
        assert torch.equal(written[key], kept), key
    compute_theirs(target)


def write_drawn(source: Path, target: Path) -> None:
    model = read_family_config(source)
    model.checkpoint = None
    gpt = build_shard({}, model)
    initialize_base(gpt, model, seed=3)
    write_hf_checkpoint(gpt, target, model=model)


@pytest.mark.parametrize("name", NAMES)
def test_a_drawn_model_has_indexers_too(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path / "base")
    run_distributed(write_drawn, 1, tmp_path / "base", tmp_path / "drawn")
    check_hf_checkpoint(model, tmp_path / "drawn")
    assert compute_theirs(tmp_path / "drawn").isfinite().all()
    drawn = [one for key, one in load_file(tmp_path / "drawn/model.safetensors").items() if ".indexer." in key]
    assert len(drawn) == 5 * (model.num_layers - len(model.layers_without_indexer))
    assert {one.std().item() > 0 for one in drawn if one.ndim == 2} == {True}


def test_full_fine_tuning_keeps_the_indexers_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    write_family_checkpoint("glm_moe_dsa", base)
    words = [
        *(
            "train",
            "model=hf",
            f"model.checkpoint={base}",
            "method=full",
            "lora.target_modules=[all]",
            "data=fake",
            "data.num_fake_examples=8",
        ),
        *(f"data.seq_len={LONG}", "track=none", "loop.num_steps=2", "loop.micro_batch_size=2", "optim.lr=1e-2"),
        *(f"model.tokenizer={ASSETS / 'demo_base'}", f"run_dir={run}", "topology=tp2", "zero.stage=1"),
    ]
    assert run_distributed(call, 2, words) == [0, 0]
    before, after = (load_file(directory / "model.safetensors") for directory in (base, run / "model"))
    assert before.keys() == after.keys()
    same = {key for key, one in before.items() if torch.equal(one, after[key])}
    assert same == {key for key in before if ".indexer." in key or key.endswith("e_score_correction_bias")}
    assert capfd.readouterr().err.count("full fine-tuning trains no indexer; those in it are the base's") == 1
    compute_theirs(run / "model")


@pytest.mark.parametrize("gone", ["model.layers.2.self_attn.indexer.wk.weight", "", "model.safetensors"])
def test_a_checkpoint_without_its_indexers_is_refused(gone: str, tmp_path: Path) -> None:
    model = write_family_checkpoint("glm_moe_dsa", tmp_path)
    path = tmp_path / "model.safetensors"
    if gone == path.name:
        path.unlink()
        with pytest.raises(OSError, match=r"holds neither .*; it is read again for what goes from it into the written"):
            CarriedTensors(model, torch.float32)
        return
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.indexer.k_norm.bias"] = torch.zeros(8)
    save_file({key: one for key, one in tensors.items() if key != gone}, path)
    message = "the checkpoint is incomplete" if gone else "layers.1.self_attn.indexer.k_norm.bias .1 in all., which its"
    with pytest.raises(ValueError, match=message):
        check_hf_checkpoint(model, tmp_path)


def test_generated_texts_end_where_positions_do(tmp_path: Path) -> None:
    model = write_family_checkpoint("deepseek_v32", tmp_path)
    check_room([POSITIONS - 4], 4, model)
    message = rf"with generate.max_new_tokens=5 {POSITIONS + 1}, but model.max_position_embeddings={POSITIONS}"
    with pytest.raises(ValueError, match=rf"{message}; shorten the context, or set generate.max_new_tokens to 4 or"):
        check_room([POSITIONS - 4], 5, model)
    words = ["generate", "model=hf", f"model.checkpoint={tmp_path}", "generate.prompt=x"]
    assert run_distributed(call, 1, [*words, f"generate.max_new_tokens={POSITIONS}"]) == [2]
    words = ["switch", "model=hf", f"model.checkpoint={tmp_path}", "adapters=[a,b]", f"seq_len={POSITIONS + 1}"]
    assert run_distributed(call, 1, words) == [2]
