"""Whole runs: what they leave behind, golden losses, resuming, and the comparison of two methods."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import ASSETS, DEMO, read_losses
from processes import run_distributed
from tiers import exhaustive

from lora_dist.cli.compose import compose_config
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.run import compare, train

GOLDEN = Path(__file__).parents[1] / "golden"


def run(verb: Any, overrides: list[str]) -> None:
    verb(compose_config(overrides))


@pytest.mark.parametrize("name", ["tiny_lora", "tiny_full"])
def test_golden_losses(name: str, tmp_path: Path) -> None:
    """A refactoring may not change them; a change of the mathematics says why it does."""
    run_distributed(run, 2, train, [f"experiment=debug/{name}", f"run_dir={tmp_path / 'run'}"])
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    losses = read_losses(tmp_path / "run")
    assert len(losses) == len(golden)
    for line, expected in zip(losses, golden, strict=True):
        assert line == pytest.approx(expected, rel=2e-5)


def test_a_run_directory_holds_its_record(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_distributed(run, 2, train, [*DEMO, "method=lora", f"run_dir={run_dir}"])
    assert {path.name for path in run_dir.iterdir()} == {
        *(".claim.json", "adapter", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "summary.json")
    }
    line = read_metrics(run_dir / "metrics.jsonl")[-1]
    wanted = {"step", "loss", "grad_norm", "lr", "tokens", "step_time_ms", "tokens_per_sec_per_gpu", "peak_memory_gib"}
    assert wanted <= line.keys()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["num_trainable_parameters"] == 4 * 16 * (4 * (256 + 256) + 2 * (256 + 1024))


@pytest.mark.parametrize(
    "variant",
    [*exhaustive([], ["lora.init=pissa"], ["lora.use_dora=true"]), ["lora.modules_to_save=[wte,ln_f]"]],
    ids=str,
)
def test_peft_gives_the_same_loss_with_the_adapter_of_a_demo_run(variant: list[str], tmp_path: Path) -> None:
    """Trained on two tensor-parallel processes on the demo base and real text, evaluated by transformers and PEFT."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    from lora_dist.data.loader import build_loaders

    overrides = [*DEMO, "method=lora", "lora.target_modules=[all]", "optim.lr=1e-2", f"run_dir={tmp_path / 'run'}"]
    overrides += variant
    run_distributed(run, 2, train, overrides)
    ours = read_losses(tmp_path / "run")[-1]["valid_loss"]
    base = GPT2LMHeadModel.from_pretrained(ASSETS / "demo_base", dtype=torch.float32)
    loaders = build_loaders(compose_config([*overrides, "data.collate=pad"]), dp_size=1, dp_rank=0)
    assert loaders.valid is not None

    def compute_loss(model: torch.nn.Module) -> float:
        total, num_tokens = 0.0, 0
        for batch in [batch for batches in loaders.valid.validation_batches() for batch in batches]:
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids_BS).logits
            chosen = batch.loss_mask_BS
            total += torch.nn.functional.cross_entropy(logits[chosen], batch.labels_BS[chosen], reduction="sum").item()
            num_tokens += int(chosen.sum())
        return total / num_tokens

    before = compute_loss(base)
    theirs = compute_loss(PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")))
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert before - theirs > 0.05, "the adapter must have learnt something"


@pytest.mark.parametrize(
    "method",
    [
        "method=lora",
        *exhaustive("method=full", "lora.init=pissa", "lora.use_dora=true", "lora.modules_to_save=[wte,ln_1]"),
    ],
)
def test_resuming_continues_bit_for_bit(method: str, tmp_path: Path) -> None:
    common = [*DEMO, method, "lora.dropout=0.1", "model.hidden_dropout=0.1", "zero=stage2", "topology=dp2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_distributed(run, 2, train, [*common, f"run_dir={whole}", "loop.save_every=2"])
    shutil.copytree(whole, cut)
    for path in (cut / "checkpoints").iterdir():
        if path.name != "step-000002":
            path.rename(tmp_path / path.name)
    run_distributed(run, 2, train, [*common, f"run_dir={cut}", "resume=auto", "loop.save_every=2"])
    assert read_losses(cut) == read_losses(whole)
    final = [path for path in (whole / "checkpoints" / "step-000004").iterdir() if path.suffix == ".safetensors"]
    assert final
    for path in final:
        assert path.read_bytes() == (cut / "checkpoints" / "step-000004" / path.name).read_bytes()


def test_compare_writes_one_report(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_distributed(run, 2, compare, [*DEMO, f"run_dir={run_dir}"])
    names = {path.name for path in run_dir.iterdir()}
    assert {"lora", "full", "report.md", "report.json", "loss.png", "memory.png", "throughput.png"} <= names
    report = json.loads((run_dir / "report.json").read_text())
    assert "10,000x" in (run_dir / "report.md").read_text()
    assert report
