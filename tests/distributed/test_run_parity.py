"""Whole runs that must learn the same: combinations that no single part's test puts together."""

from pathlib import Path

import pytest
import torch
from demo_runs import call, read_losses
from processes import run_distributed
from safetensors.torch import load_file
from tiers import exhaustive, few_of

TINY = [
    *("train", "model=tiny", "data=fake", "data.seq_len=32", "data.num_fake_examples=16", "track=none"),
    *("loop.num_steps=3", "loop.micro_batch_size=2", "loop.global_batch_size=4", "optim.lr=1e-2", "optim.eps=1e-3"),
]


def learn(run_dir: Path, num_processes: int, words: list[str]) -> list[dict[str, float]]:
    """Loss and norm of every step."""
    assert run_distributed(call, num_processes, [*TINY, *words, f"run_dir={run_dir}"]) == [0] * num_processes
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in read_losses(run_dir) if "loss" in line]


def check_same(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        ["lora.layers=[0]", "lora.bias=all"],
        ["lora.layers=[1]", "optim.weight_decay=0", "optim.lora_plus_ratio=4"],
        ["method=full", "optim.lora_plus_ratio=4"],
        *exhaustive(
            ["lora.modules_to_save=[ln_f]"],
            ["lora.layers=[0]", "lora.use_dora=true"],
            ["lora.layers=[1]", "optim.lora_plus_ratio=4"],
            ["method=full"],
            ["method=bitfit"],
        ),
    ],
    ids=" ".join,
)
def test_stages_that_train_different_kinds_of_tensors(words: list[str], stage: int, tmp_path: Path) -> None:
    """Matrices here, vectors there, LoRA+'s factors on one stage alone: the norm is still one sum over all."""
    alone = learn(tmp_path / "alone", 1, words)
    check_same(learn(tmp_path / "stages", 2, [*words, "topology=pp2", f"zero.stage={stage}"]), alone)


@pytest.mark.parametrize("method", few_of(["lora", "full"], "lora"))
@pytest.mark.parametrize("recompute", few_of(["selective", "full"], "full"))
def test_recomputing_drops_what_was_dropped(method: str, recompute: str, tmp_path: Path) -> None:
    """Under sequence parallelism layers run on a generator of their own, also when they run again."""
    words = [f"method={method}", "topology=tp2_sp", "model.hidden_dropout=0.2", "model.attention_dropout=0.2"]
    kept = learn(tmp_path / "kept", 2, words)
    check_same(learn(tmp_path / "again", 2, [*words, f"loop.recompute={recompute}"]), kept)


@pytest.mark.parametrize("method", ["lora", *exhaustive("full")])
@pytest.mark.parametrize("collate", few_of(["pad", "pack"], "pack"))
def test_rows_over_processes(method: str, collate: str, tmp_path: Path) -> None:
    """Validations, LoRA's dropout and what is written too; and it goes on where rows are cut otherwise."""
    words = [f"method={method}", "lora.dropout=0.1", "loop.eval_every=1", f"data.collate={collate}"]
    words += ["optim.schedule=constant", "optim.num_warmup_steps=0"]
    alone = learn(tmp_path / "alone", 1, words)
    cut = tmp_path / "cut"
    stopped = [*TINY, *words, "loop.num_steps=2", "topology=tp2_cp2_sp", "loop.save_every=1", f"run_dir={cut}"]
    assert run_distributed(call, 4, stopped) == [0] * 4
    check_same(learn(cut, 2, [*words, "topology=cp2", "resume=must"]), alone)
    name = Path("model", "model.safetensors") if method == "full" else Path("adapter", "adapter_model.safetensors")
    written, expected = (load_file(run_dir / name) for run_dir in (cut, tmp_path / "alone"))
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(written[key], value, atol=1e-4, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("collate", ["pad", "pack"])
def test_attention_drops_in_a_microbatch_of_one_row(collate: str, tmp_path: Path) -> None:
    words = ["model.attention_dropout=0.1", "loop.micro_batch_size=1", f"data.collate={collate}", "optim.lr=1e-9"]
    dropped = learn(tmp_path / "dropped", 1, words)
    whole = learn(tmp_path / "whole", 1, ["model.attention_dropout=0", *words[1:]])
    assert dropped[0]["loss"] != whole[0]["loss"]
    assert dropped[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.05)


def test_prefixes_through_stages_of_several_layers(tmp_path: Path) -> None:
    words = ["method=prefix_layer", "model.num_layers=4", "data.collate=pad"]
    check_same(learn(tmp_path / "stages", 2, [*words, "topology=pp2"]), learn(tmp_path / "alone", 1, words))


@pytest.mark.exhaustive
def test_partitioned_weights_are_written_whole(tmp_path: Path) -> None:
    """At a size that ZeRO-3 does partition, after validations, which leave weights partitioned; the best one too."""
    size = ["model.num_layers=2", "model.hidden_size=512", "model.ffn_hidden_size=1024", "method=full"]
    words = [*size, "loop.eval_every=1", "loop.keep_best=true", "optim.lr=1e-3", "topology.dp_size=2"]
    stages = {stage: tmp_path / f"stage{stage}" for stage in (1, 3)}
    losses = [learn(run_dir, 2, [*words, f"zero.stage={stage}"]) for stage, run_dir in stages.items()]
    check_same(*losses)
    for name in ("model", "best_model"):
        first, third = (load_file(run_dir / name / "model.safetensors") for run_dir in stages.values())
        assert first.keys() == third.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(third[key], tensor, rtol=1e-4, atol=1e-5)
