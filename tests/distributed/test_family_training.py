"""One's own Llama checkpoint, tokenizer and JSON lines: trained, resumed, handed to transformers, asked for text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_distributed
from tokenizer_files import write_llama_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_dist.cli.compose import compose_as, compose_config
from lora_dist.data.loader import build_loaders
from lora_dist.generate_job import generate
from lora_dist.generation_config import GenerateConfig
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.run import train

NUM_ROWS = 24


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """What a user brings, as overrides."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    write_llama_tokenizer(tmp_path / "base")
    rows = [{"context": f"The Vaults {number}", "target": f"is pub {number}"} for number in range(NUM_ROWS)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "valid")]
    return ["model=hf", f"model.checkpoint={tmp_path / 'base'}", "data=jsonl", *data, "data.seq_len=48", "track=none"]


def run(overrides: list[str]) -> None:
    train(compose_config([*overrides, "loop.micro_batch_size=2", "loop.global_batch_size=4", "optim.lr=1e-2"]))


def read_losses(run_dir: Path) -> list[Any]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [[line[key] for key in ("step", "loss", "grad_norm", "valid_loss") if key in line] for line in lines]


def compute_valid_loss(model: torch.nn.Module, overrides: list[str]) -> float:
    """transformers' mean loss of a target token, each example in a row of its own."""
    loaders = build_loaders(compose_config([*overrides, "data.collate=pad"]), dp_size=1, dp_rank=0)
    assert loaders.valid is not None
    total, num_tokens = 0.0, 0
    for batch in [batch for batches in loaders.valid.validation_batches() for batch in batches]:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids_BS).logits[batch.loss_mask_BS]
        labels = batch.labels_BS[batch.loss_mask_BS]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        num_tokens += len(labels)
    return total / num_tokens


def test_an_adapter_of_ones_own_llama(given: list[str], tmp_path: Path) -> None:
    """The same steps at every topology; transformers and PEFT have the run's own loss, and the adapter generates."""
    from peft import PeftModel

    lora = ["lora.rank=4", "lora.target_modules=[all]", "loop.num_steps=3"]
    losses = []
    for number, topology in enumerate([["topology=single"], ["topology=tp2_sp"], ["topology=pp2"]]):
        run_dir = tmp_path / str(number)
        run_distributed(run, 1 if number == 0 else 2, [*given, *lora, *topology, f"run_dir={run_dir}"])
        losses.append(read_losses(run_dir))
    assert losses[0][-1][-1] < losses[0][0][-1] - 0.05
    for other in losses[1:]:
        assert other == [pytest.approx(line, rel=1e-4) for line in losses[0]]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "1" / "adapter"))
    assert compute_valid_loss(adapted, given) == pytest.approx(losses[1][-1][-1], abs=1e-5)
    options = [*given[:2], f"adapter={tmp_path / '2'}", "topology=tp2", 'generate.prompt="The Vaults 3"']
    output = tmp_path / "texts.jsonl"
    run_distributed(ask, 2, [*options, "generate.max_new_tokens=5", f"generate.output={output}"])
    assert len(output.read_text().splitlines()) == 1


def ask(overrides: list[str]) -> None:
    generate(compose_as(GenerateConfig, overrides))


@pytest.mark.exhaustive
def test_full_fine_tuning_goes_on_at_another_topology(given: list[str], tmp_path: Path) -> None:
    """One step on two tensor-parallel processes, one on a single one, one on two: the gated linear is cut anew."""
    common = [*given, "method=full", "optim.schedule=constant", f"run_dir={tmp_path / 'run'}", "resume=auto"]
    run_distributed(run, 2, [*common, "topology=tp2", "loop.num_steps=1"])
    run_distributed(run, 1, [*common, "topology=single", "loop.num_steps=2"])
    run_distributed(run, 2, [*common, "topology=tp2", "loop.num_steps=3"])
    whole = [
        *given,
        "method=full",
        "optim.schedule=constant",
        f"run_dir={tmp_path / 'whole'}",
        "topology=tp2",
        "loop.num_steps=3",
    ]
    run_distributed(run, 2, whole)
    resumed, undisturbed = read_losses(tmp_path / "run")[-1], read_losses(tmp_path / "whole")[-1]
    assert resumed == pytest.approx(undisturbed, rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert compute_valid_loss(model, given) == pytest.approx(resumed[-1], abs=1e-5)
