"""How runs end that have nothing to hand on, or nothing left to do: one line, and no files that look like a result."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from demo_runs import call, read_losses
from hf_toy import build_hf_model, write_toy_checkpoint
from processes import run_distributed
from tiers import exhaustive, few_of
from wandb_files import read_exit_codes

from lora_dist.measure.wandb_sink import WandbSink

RUN = [
    *("train", "data=fake", "data.seq_len=16", "data.num_fake_examples=8", "track=none", "loop.micro_batch_size=2"),
    *("topology=tp2", "loop.num_steps=4"),
]


def train(words: list[str], code: int = 0) -> None:
    assert run_distributed(call, 2, [*RUN, *words]) == [code] * 2


@pytest.mark.parametrize("method", few_of(["lora", "full"], "lora"))
def test_a_run_that_diverged_writes_no_model(method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(["model=tiny", f"method={method}", "optim.lr=1e38", f"run_dir={tmp_path / 'run'}"], code=2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert errors
    assert "what has been trained is not finite, so it is not written; lower optim.lr" in errors[0]
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_whose_losses_overflow_writes_no_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are finite all the same. W&B is told that it failed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["model=tiny", "method=lora", "optim.lr=1e30", "loop.eval_every=4", "track=wandb"]
    train([*words, f"run_dir={tmp_path / 'run'}"], code=2)
    assert (
        "what has been trained has a validation loss of nan; it is not written; lower optim.lr"
        in capfd.readouterr().err
    )
    assert not (tmp_path / "run" / "adapter").exists()
    assert read_exit_codes(tmp_path / "run") == [1]


def lack_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place", [*exhaustive("lora_dist.keeper.write_adapter"), "lora_dist.measure.summary.Summary.write"]
)
def test_a_run_whose_last_writes_fail_is_failed_also_where_its_launcher_ends_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher sends SIGTERM as soon as the first process has left, while this one still tells W&B."""
    close = WandbSink.close

    def close_while_ended(sink: WandbSink, *, failed: bool = False) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(sink, failed=failed)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(place, lack_room)
    monkeypatch.setattr(WandbSink, "close", close_while_ended)
    train(["model=tiny", "method=lora", "track=wandb", f"run_dir={tmp_path / 'run'}"], code=2)
    assert read_exit_codes(tmp_path / "run") == [1]


def test_a_base_that_is_not_finite_trains_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build_hf_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    write_toy_checkpoint(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    given = ["model=hf", f"model.checkpoint={tmp_path / 'base'}", f"run_dir={tmp_path / 'run'}"]
    train([*given, "method=lora"], code=2)
    assert "no step was usable: no gradient was finite" in capfd.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()
    train([*given[:2], "method=lora", "loop.num_steps=30", f"run_dir={tmp_path / 'long'}"], code=2)
    assert "error: 20 steps in a row had gradients that are not finite" in capfd.readouterr().err


def test_a_run_that_is_over_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "method=lora", f"run_dir={tmp_path / 'run'}", "resume=auto"]
    train(words)
    train([*words, "loop.num_steps=2"])
    told = f"{tmp_path / 'run'} has 4 steps already, of 2 asked for; raise loop.num_steps or num_epochs to go on"
    assert capfd.readouterr().err.count(told) == 1


def test_a_run_that_was_refused_can_be_typed_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The bad row is found once the directory exists; nothing has been done there."""
    demo = Path(__file__).parents[2] / "lora_dist" / "assets" / "demo_base"
    rows = [{"context": "a", "target": "b"}] * 4
    data, words = tmp_path / "rows.jsonl", ["model=demo", f"model.checkpoint={demo}", "data=jsonl", "method=lora"]
    words += [f"data.train={data}", "data.seq_len=16", f"run_dir={tmp_path / 'run'}"]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"context": "a"}]))
    base = [*RUN[:1], *RUN[4:], *words]
    assert run_distributed(call, 2, base) == [2, 2]
    assert "rows.jsonl:5: missing key" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".claim.json", "config.yaml"]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert run_distributed(call, 2, base) == [0, 0]
    assert len(read_losses(tmp_path / "run")) == 5
    assert run_distributed(call, 1, [*base, "topology=single"]) == [2]
    assert "is not empty" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("length", "more"),
    [("loop.num_steps=1", "loop.num_steps=2"), *exhaustive(("loop.num_epochs=0.25", "loop.num_epochs=0.5"))],
)
def test_a_comparison_that_no_report_could_end_trains_nothing(
    length: str, more: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A finished run keeps the ZeRO stage it was trained in; one with steps left goes on in another."""
    run_dir = tmp_path / "run"
    words = ["compare", *RUN[1:-2], length, "model=tiny", f"run_dir={run_dir}", "resume=auto"]
    assert run_distributed(call, 1, [*words, "compare.methods=[lora]"]) == [0]
    for methods, between in (("lora,full", "lora with full"), ("full,lora", "full with lora")):
        assert run_distributed(call, 1, [*words, f"compare.methods=[{methods}]", "zero=stage2"]) == [2]
        stages = "1 / 2" if methods.startswith("lora") else "2 / 1"
        assert (
            f"error: cannot compare {between}: they differ in zero_stage {stages}; lora is finished: give the settings"
            f" it was trained with, or remove {run_dir / 'lora'}, or give another run_dir\n"
        ) in capfd.readouterr().err
        assert not (run_dir / "full").exists()
    assert run_distributed(call, 1, [*words, "compare.methods=[lora,full]", "zero=stage2", more]) == [0]
    assert (run_dir / "report.md").exists()


def test_a_summary_that_a_finished_run_never_wrote_holds_no_measurements(tmp_path: Path) -> None:
    words = ["compare", *RUN[1:-2], "loop.num_steps=1", "model=tiny", f"run_dir={tmp_path}/run", "resume=auto"]
    path = tmp_path / "run" / "lora" / "summary.json"
    assert run_distributed(call, 1, words) == [0]
    before = json.loads(path.read_text())
    path.unlink()
    assert run_distributed(call, 1, words) == [0]
    after = json.loads(path.read_text())
    assert {key for key in after if after[key] is None and before[key] is not None} == {
        *("step_ledger", "flops_per_step", "tp_collectives_per_layer", "collectives", "peak_memory", "throughput"),
        "cpu_seconds_per_step",
    }
    for key in ("static_ledger", "optimizer_state_bytes", "checkpoint_bytes", "valid_loss_before", "valid_loss_after"):
        assert after[key] == before[key]
