"""A quantised base from files, to files, and beside transformers, PEFT and bitsandbytes, on the demo base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import ASSETS, DEMO, call, read_losses
from hf_toy import build_shard, count_processes, draw_adapter_values
from processes import run_distributed
from rounding import apply_rounding

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.data.loader import build_loaders
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.generation_config import GenerationConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.base_parameters import describe_weights
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.live import attach_adapters, load_shards
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.run import train

BASE = ASSETS / "demo_base"
LORA = LoraConfig(rank=3, target_modules=["q_proj", "v_proj", "down_proj"])


def read_model(base_format: str) -> ModelConfig:
    fields = read_model_fields(BASE) | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return ModelConfig(**fields, base_format=base_format)


def open_demo(options: dict, base_format: str, dtype: torch.dtype = torch.float32) -> ShardedGpt:
    gpt = build_shard(options, read_model(base_format), dtype)
    load_hf_checkpoint(gpt, BASE)
    return gpt.requires_grad_(False)


def read_values(gpt: ShardedGpt) -> dict[str, torch.Tensor]:
    return {
        one.name: one.parameter if one.quantized is None else one.quantized.dequantize(one.parameter.dtype)
        for one in describe_weights(gpt)
    }


def load_both(options: dict, base_format: str, dtype: torch.dtype) -> tuple[Any, ...]:
    quantized = open_demo(options, base_format, dtype)
    native = build_model(
        read_model("native"), quantized.topology, dtype=torch.float32, recompute="none", clock=DropoutClock()
    )
    load_hf_checkpoint(native, BASE)
    apply_rounding(native, base_format)
    described = [{one.name: one.full_shape for one in describe_weights(gpt)} for gpt in (quantized, native)]
    return (*described, read_values(quantized), read_values(native))


@pytest.mark.parametrize(
    ("options", "base_format", "dtype"),
    [
        ({}, "nf4", torch.float32),
        ({"tp_size": 2}, "nf4_double", torch.float32),
        ({"tp_size": 2}, "nf4_double", torch.bfloat16),
        ({"pp_size": 2}, "fp8", torch.float16),
    ],
    ids=str,
)
def test_loading_quantises_what_is_stored_and_describes_it(options: dict, base_format: str, dtype: torch.dtype) -> None:
    """In a 16-bit run too: what is quantised is the file's values, not what the run's dtype makes of them."""
    for names, expected_names, values, expected in run_distributed(
        load_both, count_processes(options), options, base_format, dtype
    ):
        assert names == expected_names
        for name, value in values.items():
            assert torch.equal(value, expected[name].to(dtype)), name


def generate(options: dict, base_format: str, rounded_to: str | None) -> list[list[int]]:
    """With another adapter for each row, and none for the last."""
    gpt = open_demo(options, base_format)
    if rounded_to is not None:
        apply_rounding(gpt, rounded_to)
    model, adapters = read_model(base_format), []
    for index in range(2):
        specs = build_adapter_specs(replace(LORA, rank=2 + index), model)
        values = {name: value * (0.1 + index) for name, value in draw_adapter_values(specs, model, "none").items()}
        adapters.append(load_shards(gpt, f"task{index}", specs, values))
    attach_adapters(gpt, adapters)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    config = GenerationConfig(max_new_tokens=8)
    return generate_rows(gpt, prompts, config, end_tokens=[0], adapter_of_row=[0, 1, None])


def test_generation_with_an_adapter_for_each_row() -> None:
    expected = run_distributed(generate, 1, {}, "native", "nf4")[0]
    assert len({tuple(row) for row in expected}) == 3
    for options in ({}, {"tp_size": 2}, {"pp_size": 2}):
        assert run_distributed(generate, count_processes(options), options, "nf4", None)[0] == expected
    assert run_distributed(generate, 1, {}, "native", None)[0] != expected, "quantising must show"


NF4_RUN = [*DEMO, "model.base_format=nf4_double", "optim.lr=1e-2", "loop.save_every=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("nf4") / "run"
    run_distributed(run, 2, [*NF4_RUN, "loop.num_steps=8", f"run_dir={run_dir}"])
    return run_dir


def run(overrides: list[str]) -> None:
    train(compose_config(overrides))


def test_training_over_nf4_learns(trained: Path) -> None:
    losses = [line["valid_loss"] for line in read_losses(trained) if "valid_loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert json.loads((trained / "adapter/manifest.json").read_text())["base_format"] == "nf4_double"


def test_another_format_is_not_resumed(trained: Path) -> None:
    with pytest.raises(AssertionError, match=r"model.base_format is 'nf4_double' there and 'fp8' in this run"):
        run_distributed(run, 2, [*NF4_RUN, f"run_dir={trained}", "resume=must", "model.base_format=fp8"])


def compute_valid_loss(model: torch.nn.Module) -> float:
    loaders = build_loaders(compose_config([*DEMO, "data.collate=pad"]), dp_size=1, dp_rank=0)
    assert loaders.valid is not None
    total, num_tokens = 0.0, 0
    for batch in [batch for batches in loaders.valid.validation_batches() for batch in batches]:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids_BS).logits
        chosen = batch.loss_mask_BS
        total += torch.nn.functional.cross_entropy(logits[chosen], batch.labels_BS[chosen], reduction="sum").item()
        num_tokens += int(chosen.sum())
    return total / num_tokens


def test_the_merged_model_is_the_one_that_was_trained(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2LMHeadModel

    losses = {}
    for base_format in ("nf4_double", "native"):
        output = tmp_path / base_format
        words = ["merge", f"model.base_format={base_format}", f"adapter={trained / 'adapter'}", f"output={output}"]
        assert run_distributed(call, 2, [*words, "topology=tp2"]) == [0, 0]
        losses[base_format] = compute_valid_loss(GPT2LMHeadModel.from_pretrained(output, dtype=torch.float32))
    assert "the base as nf4_double holds it, with the adapter: rounding to torch." in capfd.readouterr().out
    ours = read_losses(trained)[-1]["valid_loss"]
    assert losses["nf4_double"] == pytest.approx(ours, abs=2e-4)  # the file's 16 bits
    assert abs(losses["native"] - ours) > 1e-3, "the base's rounding must show"


def test_merging_into_a_live_quantised_base_is_refused(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["generate", f"adapter={trained}", "model.base_format=nf4", "generate.prompt=It", "generate.merge=true"]
    assert run_distributed(call, 1, words) == [2]
    assert "an adapter cannot be merged into a quantised base in place" in capfd.readouterr().err
    assert run_distributed(call, 1, words[:-1]) == [0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["dora", "bitfit"])
def test_what_would_be_merged_runs_beside_a_quantised_base(method: str, tmp_path: Path) -> None:
    """As it was trained: `evaluate` finds what `merge` writes into the dequantised weights to answer alike."""
    run, base = tmp_path / "run", ["model.base_format=fp8", "device=cpu"]
    few = ["data.max_train_examples=16", "data.max_valid_examples=2", "loop.global_batch_size=4", "topology=single"]
    words = [*DEMO, *base, *few, "optim.lr=2e-2", f"method={method}", f"run_dir={run}"]
    assert run_distributed(call, 1, ["train", *words]) == [0]
    assert run_distributed(call, 1, ["merge", *base[:1], f"adapter={run}", f"output={tmp_path / 'merged'}"]) == [0]
    (tmp_path / "asked.jsonl").write_text('{"context": "name : The Vaults | Type : pub", "target": "x"}\n')
    short = ["generate.max_new_tokens=12", f"generate.input={tmp_path / 'asked.jsonl'}"]
    texts = []
    for name, words in (
        ("beside", [*base, f"adapter={run}"]),
        ("merged", ["model=hf", f"model.checkpoint={tmp_path / 'merged'}"]),
        ("base", base),
    ):
        output = tmp_path / f"{name}.jsonl"
        assert run_distributed(call, 1, ["generate", *words, *short, f"generate.output={output}"]) == [0]
        texts.append([json.loads(line)["text"] for line in output.read_text().splitlines()])
    assert texts[0] == texts[1] != texts[2]
    task = ["task=jsonl", f"task.references={tmp_path / 'asked.jsonl'}", "generate.max_new_tokens=2"]
    assert run_distributed(call, 1, ["evaluate", *base, *task, f"adapter={run}"]) == [0]


def write_adapter(directory: Path) -> Path:
    model = read_model("native")
    specs = build_adapter_specs(LORA, model)
    adapter = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(directory, adapter, model, {}, base_fingerprint="base")
    return directory


@torch.no_grad()
def compute_our_logits(tokens_BS: torch.Tensor) -> torch.Tensor:
    gpt, model = open_demo({}, "nf4"), read_model("nf4")
    specs = build_adapter_specs(LORA, model)
    for name, shard in load_shards(gpt, "mine", specs, draw_adapter_values(specs, model, "none")).shards.items():
        gpt.get_submodule(name).lora = shard
    logits_BSV: torch.Tensor = gpt.eval()(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)
    return logits_BSV[..., : gpt.true_vocab_size]


def test_peft_on_transformers_with_bitsandbytes_computes_the_same(tmp_path: Path) -> None:
    """The real QLoRA stack on the CPU, from the same two directories, in fp32 (in eval mode it may compute in bf16)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=config, device_map="cpu", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, write_adapter(tmp_path / "adapter")).train()
    tokens_BS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = peft(tokens_BS).logits.detach()
    actual = run_distributed(compute_our_logits, 1, tokens_BS)[0]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
