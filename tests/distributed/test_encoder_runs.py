"""`lora-dist classify`: runs that train, resume, are scored and begun from; what their files hold; what is refused."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_runs import call
from encoder_toy import (
    ALL_TARGETS,
    build_config,
    open_alone,
    write_rte,
)
from processes import run_distributed
from transformers import AutoModelForSequenceClassification
from wandb_files import read_exit_codes

from lora_dist.checkpoint.listing import list_adapters
from lora_dist.classify_config import EncoderConfig
from lora_dist.cli.classify import adopt_trained
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig
from lora_dist.encoders.classify import score_job
from lora_dist.encoders.job import write
from lora_dist.encoders.model import read_family
from lora_dist.mcore.parallel import open_topology
from lora_dist.run_dir import name_trained, prepare_run_dir
from lora_dist.task_config import TaskConfig


def describe_command(tmp_path: Path, run: str, *words: str) -> list[str]:
    config = build_config(tmp_path, "roberta")
    return [
        *("classify", f"encoder.checkpoint={config.encoder.checkpoint}", "encoder.seq_len=16", "track=none"),
        *("task=glue_sst2", f"task.references={tmp_path / 'dev.tsv'}", "device=cpu", f"run_dir={tmp_path / run}"),
        *("loop.micro_batch_size=4", "loop.global_batch_size=16", "optim.lr=1e-2", "lora.target_modules=[all]", *words),
    ]


def test_a_run_goes_on_to_more_epochs(tmp_path: Path) -> None:
    """As `train` does: at a constant rate to what a run of all epochs learns, bit for bit."""
    train = [f"train={tmp_path / 'train.tsv'}", "optim.schedule=constant", "optim.num_warmup_steps=0"]
    for run, words in (
        ("whole", ["loop.num_epochs=4"]),
        ("parts", ["loop.num_epochs=2"]),
        ("parts", ["loop.num_epochs=4", "resume=must"]),
    ):
        assert run_distributed(call, 1, describe_command(tmp_path, run, *train, *words)) == [0]
    whole, parts = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "parts"))
    assert whole["num_steps_done"] == parts["num_steps_done"] == 12
    assert whole["valid_loss_after"] == parts["valid_loss_after"]


def test_a_run_trains_resumes_and_is_scored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_words = [f"train={tmp_path / 'train.tsv'}", "loop.num_epochs=20", "optim.warmup_ratio=0.1"]
    assert run_distributed(call, 1, describe_command(tmp_path, "whole", *train_words)) == [0]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["num_steps_done"] == 60
    assert summary["scores"]["accuracy"] == 100.0
    assert summary["num_trainable_parameters"] - summary["num_trained_of_head"] == 2 * 8 * (4 * 64 + 2 * 80)

    # two replicas lose their last checkpoint, and one process goes on from the one before
    part = [*train_words, "topology=dp2"]
    stop = describe_command(tmp_path, "part", *part, "loop.save_every=20")
    assert run_distributed(call, 2, stop) == [0, 0]
    newest = sorted((tmp_path / "part" / "checkpoints").iterdir())
    assert [path.name for path in newest] == ["step-000040", "step-000060"]
    for path in newest[-1].iterdir():
        path.unlink()
    newest[-1].rmdir()
    (tmp_path / "part" / "adapter" / "adapter_model.safetensors").unlink()
    again = describe_command(tmp_path, "part", *train_words, "topology=single", "zero=stage0", "resume=must")
    assert run_distributed(call, 1, again) == [0]
    other = json.loads((tmp_path / "part" / "summary.json").read_text())
    assert other["valid_loss_after"] == pytest.approx(summary["valid_loss_after"], rel=1e-4)

    rows = list_adapters(tmp_path / "whole")
    assert [(row.task, row.rank, row.targets, row.state) for row in rows] == [
        ("glue_sst2", "8", "lora q,k,v,o,up,down", "whole")
    ]
    words = ["evaluate", "task=glue_sst2", f"task.references={tmp_path / 'dev.tsv'}", f"adapter={tmp_path / 'whole'}"]
    assert run_distributed(call, 1, words) == [2]
    assert "is an encoder's; lora-dist classify adapter=" in capfd.readouterr().err

    dev = [line.split("\t") for line in (tmp_path / "dev.tsv").read_text().splitlines()[1:]]
    test = "".join(f"{row}\t{sentence}\n" for row, (sentence, _) in enumerate(dev[:5]))
    (tmp_path / "test.tsv").write_text(f"index\tsentence\n{test}")
    scored = describe_command(
        tmp_path, "scored", f"adapter={tmp_path / 'whole'}", f"predict={tmp_path / 'test.tsv'}", "topology=dp2"
    )
    assert run_distributed(call, 2, scored) == [0, 0]
    again = json.loads((tmp_path / "scored" / "summary.json").read_text())
    assert again["scores"] == summary["scores"]
    assert again["data"]["predict"] == {"num_rows": 5, "num_cut": 0}
    tsv = (tmp_path / "scored" / "predictions-glue_sst2.tsv").read_text().splitlines()
    assert tsv == ["index\tprediction", *(f"{row}\t{label}" for row, (_, label) in enumerate(dev[:5]))]
    lines = [
        (tmp_path / "scored" / f"{name}-glue_sst2.jsonl").read_text().splitlines()
        for name in ("predictions", "classify")
    ]
    assert lines[0] == lines[1][:5]


def test_a_run_that_diverged_is_refused_and_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [f"train={tmp_path / 'train.tsv'}", "loop.num_steps=2", "optim.lr=1e38", "track=wandb"]
    assert run_distributed(call, 1, describe_command(tmp_path, "run", *words)) == [2]
    assert "is not written; lower optim.lr" in capfd.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()
    assert read_exit_codes(tmp_path / "run") == [1]


def test_a_run_whose_adapter_has_no_room_is_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("lora_dist.encoders.job.write_trained", lack_room)
    words = [f"train={tmp_path / 'train.tsv'}", "loop.num_steps=2", "track=wandb"]
    assert run_distributed(call, 1, describe_command(tmp_path, "run", *words)) == [2]
    assert read_exit_codes(tmp_path / "run") == [1]


def test_a_whole_model_is_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    words = [f"train={tmp_path / 'train.tsv'}", "loop.num_steps=2", "encoder.method=full", "optim.lr=1e-3"]
    assert run_distributed(call, 1, describe_command(tmp_path, "full", *words)) == [0]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "full" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    content = json.loads((tmp_path / "full" / "model" / "config.json").read_text())
    content["id2label"] = dict(reversed(content["id2label"].items()))  # the order of the file means nothing
    (tmp_path / "full" / "model" / "config.json").write_text(json.dumps(content))
    scored = describe_command(tmp_path, "again", f"encoder.checkpoint={tmp_path / 'full' / 'model'}")
    assert run_distributed(call, 1, scored) == [0]
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("full", "again")]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    counts = {"num_rows": 48, "num_cut": 0, "skipped_rows": {}}
    assert summaries[0]["data"] == {"train": counts, "references": {"num_rows": 7, "num_cut": 0}}


def read_outputs(run_dir: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (run_dir / "classify-banking77.jsonl").read_text().splitlines()]
    return {row["context"]: row["text"] for row in rows}


def test_a_file_that_lacks_a_label_is_scored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [f"it was {word},{label}" for word, label in (("good", "a"), ("bad", "b"), ("fine", "c"))]
    for name, chosen in (("train.csv", rows * 4), ("few.csv", rows[1:]), ("other.csv", ["it was good,d"])):
        (tmp_path / name).write_text("\n".join(["text,category", *chosen]) + "\n")
    task = ["task=banking77", "loop.num_steps=10"]
    for method in ("lora", "full"):
        train = [*task, f"task.references={tmp_path / 'train.csv'}", f"train={tmp_path / 'train.csv'}"]
        words = describe_command(tmp_path, method, *train, f"encoder.method={method}")
        assert run_distributed(call, 1, words) == [0]
    trained = (f"adapter={tmp_path / 'lora'}", f"encoder.checkpoint={tmp_path / 'full' / 'model'}")
    for method, given in zip(("lora", "full"), trained, strict=True):
        words = [*task, f"task.references={tmp_path / 'few.csv'}", given, f"predict={tmp_path / 'other.csv'}"]
        assert run_distributed(call, 1, describe_command(tmp_path, f"{method}-few", *words)) == [0]
        answered = (tmp_path / f"{method}-few" / "predictions-banking77.jsonl").read_text()  # its label is not known
        expected = read_outputs(tmp_path / method)["it was good"]
        assert json.loads(answered) == {"context": "it was good", "text": expected}
        said, again = (read_outputs(tmp_path / run) for run in (method, f"{method}-few"))
        assert again == {context: said[context] for context in ("it was bad", "it was fine")}
        words = [*task, f"task.references={tmp_path / 'other.csv'}", given]
        assert run_distributed(call, 1, describe_command(tmp_path, f"{method}-other", *words)) == [2]
        assert "label 'd' is none of the 3 that are known (a, b, c" in capfd.readouterr().err


def test_a_run_validated_on_other_rows_is_not_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = [f"train={tmp_path / 'train.tsv'}", "loop.num_steps=1"]
    assert run_distributed(call, 1, describe_command(tmp_path, "run", *train)) == [0]
    other = [*train, "loop.num_steps=2", "resume=must", f"task.references={tmp_path / 'train.tsv'}"]
    assert run_distributed(call, 1, describe_command(tmp_path, "run", *other)) == [2]
    assert "that run was scored on other rows than task.references=" in capfd.readouterr().err


def test_numbers_are_predicted_by_one_output(tmp_path: Path) -> None:
    lines = [
        "index\tsentence1\tsentence2\tscore",
        *(f"{n}\tit was {w}\ta film\t{n}.5" for n, w in enumerate(["good", "bad", "fine"])),
    ]
    (tmp_path / "stsb.tsv").write_text("\n".join(lines) + "\n")
    task = TaskConfig(name="glue_stsb", format="glue_stsb", metric="correlation", references=str(tmp_path / "stsb.tsv"))
    config = build_config(tmp_path, "roberta", task=task, train=str(tmp_path / "stsb.tsv"))

    def run() -> float:
        Path(config.run_dir).mkdir()
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            batches = job.loader(job.data.train).batches_at(0)
            for step in range(80):
                loss = job.engine.train_step(batches, step=step, lr=1e-2).loss
            score_job(job, {})
            return loss

    assert run_distributed(run, 1)[0] < 0.5
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "run" / "classify-glue_stsb.jsonl").read_text().splitlines()
    ]
    assert float(texts[0]) < float(texts[1]) < float(texts[2])


def load_refused(tmp_path: Path, **options: object) -> str:
    config = build_config(tmp_path, "roberta", adapter=str(tmp_path / "run" / "adapter"), **options)

    def open_it() -> str:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            try:
                open_alone(config, topology)
            except ValueError as error:
                return str(error)
        return ""

    return str(run_distributed(open_it, 1)[0])


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = build_config(tmp_path, "roberta")

    def write_it() -> None:
        with open_topology(config.topology, device=torch.device("cpu"), local_rank=0, seed=0) as topology:
            job = open_alone(config, topology)
            write(job, name_trained(config), 0, {})

    run_distributed(write_it, 1)
    assert load_refused(tmp_path) == ""
    thin = LoraConfig(rank=2, alpha=6.0, target_modules=ALL_TARGETS)
    assert "r is 3, lora.rank, lora.alpha and lora.use_rslora of this job make it 2" in load_refused(
        tmp_path, lora=thin
    )
    few = LoraConfig(rank=3, alpha=6.0, target_modules=["q_proj"])
    assert "lora_alpha is 6, lora.rank, lora.alpha" in load_refused(
        tmp_path, lora=LoraConfig(rank=3, alpha=3.0, target_modules=ALL_TARGETS)
    )
    assert "attention.output.dense.lora_A, which this job does not train" in load_refused(tmp_path, lora=few)
    write_rte(tmp_path / "rte.tsv")
    other = TaskConfig(name="rte", format="glue_rte", metric="accuracy", references=str(tmp_path / "rte.tsv"))
    options = {"task": other, "train": str(tmp_path / "rte.tsv")}
    assert "labels is ['negative', 'positive'], this job has ['entailment'" in load_refused(tmp_path, **options)
    assert load_refused(tmp_path, **options, adapter_head=False) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topology=tp2"], "an encoder is whole on every process, got tp 2"),
        (["lora.dropout=0.1"], "takes factors alone"),
        (["task.metric=rouge"], "task.metric='rouge' is not one of accuracy"),
        (["encoder.method=bitfit", "dtype=bf16"], "encoder.method=bitfit trains weights of the base"),
        (["encoder.checkpoint=/nowhere"], "has no config.json"),
        (["lora.target_modules=[gate_proj]"], "matches nothing"),
        (["encoder.seq_len=40"], "encoder.seq_len=40 exceeds the 39 positions of"),
        (["train=null"], "has no head for 2 labels; give train=FILE"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = describe_command(tmp_path, "wrong", f"train={tmp_path / 'train.tsv'}", *words)
    assert run_distributed(call, 1, wrong) == [2]
    assert message in capfd.readouterr().err


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama' is none of roberta, deberta"):
        read_family(EncoderConfig(name="llama", checkpoint=str(tmp_path)))


def test_a_decoders_run_is_not_scored(tmp_path: Path) -> None:
    """Named by itself or by what it wrote."""
    run_dir = prepare_run_dir(compose_config(["model=tiny", "data=fake", f"run_dir={tmp_path / 'decoder'}"]))
    config = build_config(tmp_path, "roberta", train=None)
    for adapter in (run_dir, run_dir / "best_adapter"):
        with pytest.raises(ValueError, match=r"is of a decoder's run; give a run of lora-dist classify"):
            adopt_trained(replace(config, adapter=str(adapter)))
