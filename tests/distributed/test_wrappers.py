"""Checkpoints of models that see pictures: their text models as transformers has them, and the whole written again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import read_in, write_with_peft
from demo_runs import ASSETS, call
from family_toy import read_family_config
from fp8_files import LAYOUTS, write_fp8_checkpoint
from hf_toy import build_shard, compute_logits, count_processes, draw_adapter_values
from processes import run_distributed
from safetensors.torch import load_file, save_file
from tiers import few_of
from wrapper_toy import (
    WRAPPERS,
    build_wrapper,
    draw_words,
    edit_text_config,
    look,
    open_whole,
    write_words,
    write_wrapper,
)

from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint, compute_base_fingerprint, is_quantized, read_dtype
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint

TP2 = {"tp_size": 2, "sequence_parallel": True}
TARGETS = {
    "gemma3": ["q_proj", "o_proj", "down_proj"],
    "mistral3": ["q_proj", "v_proj", "gate_proj"],
    "mistral3_ministral": ["q_proj", "k_proj"],
    "kimi_k25": ["q_a_proj", "kv_b_proj", "o_proj"],
    "qwen3_5": ["in_proj_qkv", "q_proj", "out_proj"],
    "qwen3_5_moe": ["in_proj_z", "o_proj"],
    "qwen3_vl_moe": ["k_proj", "o_proj"],
}
VISION_TARGETS = {
    **{"gemma3": "out_proj", "mistral3": "attention.k_proj", "kimi_k25": "in_proj"},
    "mistral3_ministral": "attention.k_proj",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"), "attn.qkv"),
}
PROCESSORS = ["preprocessor_config.json", "processor_config.json", "chat_template.json"]


def compute_ours(options: dict, source: Path, dtype: torch.dtype) -> torch.Tensor | None:
    gpt = build_shard(options, read_family_config(source), dtype)
    load_hf_checkpoint(gpt, source)
    return compute_logits(gpt, draw_words())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRAPPERS)
def test_logits_are_those_of_the_whole_model_without_pictures(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = write_wrapper(name, tmp_path, nested=dtype == torch.float64)
    check_hf_checkpoint(model, tmp_path)
    with torch.no_grad():
        expected = build_wrapper(name).to(dtype)(input_ids=draw_words()).logits
    for logits in run_distributed(compute_ours, count_processes(TP2), TP2, tmp_path, dtype):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()  # transformers' norms are fp32 in both


def load_and_write(options: dict, source: Path, target: Path, template: str | None = None) -> None:
    gpt = build_shard(options, read_family_config(source))
    load_hf_checkpoint(gpt, source)
    model = replace(gpt.model, chat_template=template)
    write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=20_000)


@pytest.mark.parametrize("nested", [False, True], ids=["published", "nested"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_nothing_changed_is_written_as_it_was(name: str, nested: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_wrapper(name, source, nested=nested)
    for file in PROCESSORS:
        (source / file).write_text(f'{{"of": "{file}"}}')
    run_distributed(load_and_write, 4, {"tp_size": 2, "pp_size": 2}, source, target)
    before = load_file(source / "model.safetensors")
    after = {key: one for path in target.glob("*.safetensors") for key, one in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[key]) for key, one in before.items())
    assert torch.equal(look(open_whole(target), name), look(open_whole(source), name))
    assert all((target / file).read_bytes() == (source / file).read_bytes() for file in PROCESSORS)
    config, written = (json.loads((directory / "config.json").read_text()) for directory in (source, target))
    without_extra = {"num_nextn_predict_layers": 0} if name == "kimi_k25" else {}
    text = config["text_config"] | {"dtype": "float32"} | without_extra
    assert written == config | {"dtype": "float32", "text_config": text}


def test_a_chat_template_of_the_run_takes_the_place_of_the_processors(tmp_path: Path) -> None:
    source, target, template = (tmp_path / part for part in ("source", "target", "mine.jinja"))
    write_wrapper("gemma3", source)
    (source / "chat_template.json").write_text('{"chat_template": "theirs"}')
    template.write_text("mine")
    run_distributed(load_and_write, 1, {}, source, target, str(template))
    assert (target / "chat_template.jinja").read_text() == "mine"
    assert not (target / "chat_template.json").exists()


def compute_with_peft(base: Path, adapter: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """After words alone, and after a picture."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(open_whole(base), adapter).eval()
    adapted = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert adapted
    assert all(".model.language_model.layers." in key for key in adapted)
    with torch.no_grad():
        return model(input_ids=draw_words()).logits, look(model, name)


def write_adapter(model: ModelConfig, target: Path, lora: LoraConfig) -> None:
    specs = build_adapter_specs(lora, model)
    modules = lora.modules_to_save
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"), modules=modules)
    if modules:
        content.values.update(draw_adapter_values(specs, model, "none", modules))
    fingerprint = compute_base_fingerprint(model, 0)
    write_adapter_directory(target, content, model, {"task": "toy"}, base_fingerprint=fingerprint)


@pytest.mark.parametrize("modules", [[], ["norm", "input_layernorm"]], ids=["factors", "norms"])
@pytest.mark.parametrize("name", few_of(WRAPPERS, "gemma3", "mistral3", "kimi_k25"))
def test_what_is_merged_is_what_peft_makes_of_the_whole_model(name: str, modules: list[str], tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / part for part in ("base", "adapter", "merged"))
    model = write_wrapper(name, base)
    write_adapter(model, adapter, LoraConfig(rank=3, target_modules=["all"], modules_to_save=modules))
    words = ["merge", "model=hf", f"model.checkpoint={base}", f"adapter={adapter}", f"output={merged}", "topology=tp2"]
    assert run_distributed(call, 2, words) == [0, 0]
    whole = open_whole(merged)
    with torch.no_grad():
        actual = whole(input_ids=draw_words()).logits, look(whole, name)
    for ours, theirs in zip(actual, compute_with_peft(base, adapter, name), strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (actual[1] - look(build_wrapper(name), name)).abs().max() > 0.1
    if modules:
        (adapter / "manifest.json").unlink()
        stored = read_in(adapter, tmp_path / "again", model)
        assert stored.modules == sorted(modules)
        export_adapter(stored, tmp_path / "out", "peft")
        assert_same_weights(adapter, tmp_path / "out")


def assert_same_weights(one: Path, other: Path) -> None:
    raw = [(directory / "adapter_model.safetensors").read_bytes() for directory in (one, other)]
    assert raw[0] == raw[1]


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_adapter_that_peft_wrote_comes_in_and_goes_out_as_it_was(name: str, tmp_path: Path) -> None:
    base, source = tmp_path / "base", tmp_path / "source"
    model = write_wrapper(name, base)
    targets = rf".*language_model.*\.({'|'.join(TARGETS[name])})"
    write_with_peft(build_wrapper(name), source, target_modules=targets, r=2)
    stored = read_in(source, tmp_path / "stored", model)
    for format in ["peft", *(["peft_split"] if name != "qwen3_5" else [])]:  # which has no place for its fused linear
        export_adapter(stored, tmp_path / format, format)
        assert_same_weights(source, tmp_path / format)
        settings = json.loads((tmp_path / format / "adapter_config.json").read_text())
        assert all(one.startswith("model.language_model.layers.") for one in settings["target_modules"])
    ours, theirs = (compute_with_peft(base, adapter, name) for adapter in (tmp_path / "stored", source))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_peft_trained_beside_the_text_model_is_refused_or_dropped(name: str, tmp_path: Path) -> None:
    model = write_wrapper(name, tmp_path / "base")
    write_with_peft(build_wrapper(name), tmp_path / "source", target_modules=[VISION_TARGETS[name], "o_proj"], r=2)
    with pytest.raises(
        ValueError, match=rf"is beside the text model of a {model.wrapper}.* leave it out with drop=\['"
    ) as caught:
        read_in(tmp_path / "source", tmp_path / "stored", model)
    pattern = str(caught.value).rpartition("drop=['")[2].removesuffix("']")
    if name == "mistral3":
        assert pattern == r"base_model\.model\.model\.vision_tower\..*"
    stored = read_in(tmp_path / "source", tmp_path / "stored", model, drop=[pattern])
    assert {spec.target for spec in stored.specs} == {"o_proj"}


@pytest.mark.parametrize(
    ("name", "layout"), [("mistral3", "mistral"), ("gemma3", "compressed_row"), ("kimi_k25", "int4_experts")]
)
def test_what_is_published_quantised_is_read_and_written_as_its_values(name: str, layout: str, tmp_path: Path) -> None:
    source, coded, plain, target = (tmp_path / part for part in ("source", "coded", "plain", "target"))
    write_wrapper(name, source)
    values = write_fp8_checkpoint(source, coded, plain, layout=LAYOUTS[layout])
    if name == "kimi_k25":  # where that is published
        config = json.loads((coded / "config.json").read_text())
        edit_text_config(coded, quantization_config=config.pop("quantization_config"))
        config["text_config"] = json.loads((coded / "config.json").read_text())["text_config"]
        (coded / "config.json").write_text(json.dumps(config))
    assert is_quantized(coded)
    assert read_dtype(coded) == torch.bfloat16
    run_distributed(load_and_write, 2, TP2, coded, target)
    written = {key: one for path in target.glob("*.safetensors") for key, one in load_file(path).items()}
    assert written.keys() == values.keys()
    stored = {name for path in coded.glob("*.safetensors") for name in load_file(path)}
    was_coded = {name.partition("_scale")[0] for name in stored if "_scale" in name}
    for key, value in values.items():
        beside = not key.startswith("language_model.")
        assert torch.equal(written[key], value.bfloat16() if beside and key in was_coded else value), key
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config | config["text_config"]
    open_whole(target)


@pytest.mark.parametrize("begins", ["language_model.model.", "model."], ids=["older transformers", "text alone"])
def test_adapters_by_other_names_of_the_text_model_come_in(begins: str, tmp_path: Path) -> None:
    """From before transformers 4.52, and from a checkpoint of the text model alone."""
    model, source = write_wrapper("gemma3", tmp_path / "base"), tmp_path / "source"
    write_with_peft(
        build_wrapper("gemma3"),
        source,
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["language_model.norm"],
        r=2,
    )
    expected = read_in(source, tmp_path / "expected", model).read()
    prefix, tensors = "base_model.model.", load_file(source / "adapter_model.safetensors")
    renamed = {key.replace(f"{prefix}model.language_model.", prefix + begins): one for key, one in tensors.items()}
    save_file(renamed, source / "adapter_model.safetensors")
    stored = read_in(source, tmp_path / "stored", model)
    assert stored.modules == ["norm"]
    actual = stored.read()
    assert actual.values.keys() == expected.values.keys()
    assert all(torch.equal(one, expected.values[key]) for key, one in actual.values.items())


TRAIN = [
    *("model=hf", "data=fake", "data.num_fake_examples=8", "data.seq_len=16", "track=none", "loop.num_steps=2"),
    *("loop.micro_batch_size=2", "optim.lr=1e-2", f"model.tokenizer={ASSETS / 'demo_base'}"),
]


def test_training_whole_text_models_leaves_what_sees_pictures(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    write_wrapper("mistral3", base, nested=True, dtype=torch.bfloat16)
    words = ["train", *TRAIN, "method=full", f"model.checkpoint={base}", f"run_dir={run}", "topology=tp2", "dtype=bf16"]
    assert run_distributed(call, 2, [*words, "zero.stage=1"]) == [0, 0]
    before, after = (load_file(directory / "model.safetensors") for directory in (base, run / "model"))
    assert before.keys() == after.keys()
    same = {key for key, one in before.items() if torch.equal(one, after[key])}
    assert same == {key for key in before if not key.startswith(("model.language_model.", "lm_head."))}
    assert {one.dtype for one in after.values()} == {torch.bfloat16}
    open_whole(run / "model")


def test_an_adapter_is_trained_and_answers(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    write_wrapper("gemma3", base)
    words = ["train", *TRAIN, f"model.checkpoint={base}", f"run_dir={run}", "lora.target_modules=[all-linear]"]
    assert run_distributed(call, 1, words) == [0]
    adapted, _ = compute_with_peft(base, run / "adapter", "gemma3")
    with torch.no_grad():
        assert (adapted - open_whole(base)(input_ids=draw_words()).logits).abs().max() > 1e-3
    write_words(base)
    answer = ["generate", "model=hf", f"model.checkpoint={base}", f"adapter={run}", "generate.prompt=w1 w2"]
    assert run_distributed(call, 1, [*answer, "generate.max_new_tokens=2"]) == [0]
