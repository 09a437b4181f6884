"""`lora-dist evaluate adapter=RUN` as a user types it: what it answers, at any topology, after a kill, and refuses."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from generation_judge import draw_prompts
from hf_toy import build_hf_model, build_shard, count_processes, read_toy_config, write_toy_checkpoint
from processes import run_distributed
from safetensors.torch import load_file, save_file
from test_generate_verb import call_until_killed
from tiers import few_of
from transformers import AutoTokenizer, GPT2LMHeadModel

from lora_dist.cli.compose import compose_config
from lora_dist.cli.main import main
from lora_dist.mcore.generate import choose_answers
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.run import train

ASSETS = Path(__file__).parents[2] / "lora_dist" / "assets"
TASKS = Path(__file__).parents[1] / "data" / "tasks"
SHORT = ["generate.max_new_tokens=6", "generate.batch_size=2"]


def call(words: list[str]) -> int:
    """`lora-dist WORDS` as one process of a job that a launcher started."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


def run_train(words: list[str]) -> None:
    train(compose_config(words))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base in fp32, a run of a few steps over it, and a task's references."""
    place = tmp_path_factory.mktemp("place")
    base = place / "base"
    shutil.copytree(ASSETS / "demo_base", base)
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    words = ["experiment=e2e_demo", "method=lora", f"model.checkpoint={base}", "track=none", "data.valid=null"]
    words += ["loop.num_steps=4", "loop.micro_batch_size=2", "optim.lr=1e-2", "optim.num_warmup_steps=0"]
    run_distributed(run_train, 2, [*words, f"run_dir={place / 'run'}"])
    rows = (ASSETS / "e2e_sample" / "test.txt").read_text(encoding="utf-8").splitlines()[:60:6]
    (place / "e2e.txt").write_text("\n".join(rows), encoding="utf-8")
    (place / "whole" / "model").mkdir(parents=True)
    pairs = [dict(zip(("context", "target"), row.split("||"), strict=True)) for row in rows]
    (place / "e2e.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return place


def on_run(place: Path, task: str = "jsonl", references: Path | None = None) -> list[str]:
    """The same contexts as JSON lines, unless told otherwise: exact matches take less time to count than METEOR."""
    words = [f"model.checkpoint={place / 'base'}", f"adapter={place / 'run'}", f"task={task}"]
    return [*words, f"task.references={references or place / 'e2e.jsonl'}", *SHORT]


@pytest.mark.parametrize("topology", few_of(["single", "dp2", "tp2"], "dp2"))
def test_a_run_answers_a_task_as_generate_does(topology: str, place: Path, tmp_path: Path) -> None:
    texts, out, num_processes = tmp_path / "texts.jsonl", tmp_path / "out.jsonl", 1 if topology == "single" else 2
    words = ["evaluate", *on_run(place), "generate=paper_e2e", f"topology={topology}", f"texts={texts}"]
    assert run_distributed(call, num_processes, words) == [0] * num_processes
    base, adapter = f"model.checkpoint={place / 'base'}", f"adapter={place / 'run'}"
    files = [f"generate.input={place / 'e2e.jsonl'}", f"generate.output={out}"]
    assert run_distributed(call, 1, ["generate", base, adapter, *files, *SHORT, "generate=paper_e2e"]) == [0]
    generated = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    distinct = list({line["context"]: line for line in generated}.values())
    assert [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()] == distinct
    assert len({line["text"] for line in distinct}) > 1


def test_scores_stand_beside_the_papers(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, which takes ten seconds
    texts = tmp_path / "texts.jsonl"
    words = ["evaluate", *on_run(place, "e2e", place / "e2e.txt"), "generate=greedy", f"texts={texts}"]
    assert run_distributed(call, 1, words) == [0]
    record = json.loads((tmp_path / "texts.jsonl.scores.json").read_text())
    assert (record["task"], record["predictions"]) == ("e2e", str(texts))
    printed = capfd.readouterr().out
    assert "| paper: GPT-2 M, LoRA 0.35M, tokenised | 70.4±.1 | 8.85±.02 |" in printed
    assert f"{record['rows'][0]['values']['BLEU']:.2f}" in printed


def test_the_run_keeps_texts_scores_and_the_record_of_its_tracking(place: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(place / "run", run_dir)
    config = (run_dir / "config.yaml").read_text()
    assert config.count("backend: none") == 1
    (run_dir / "config.yaml").write_text(config.replace("backend: none", "backend: wandb"))
    words = [word.replace(str(place / "run"), str(run_dir)) for word in on_run(place)]
    assert run_distributed(call, 1, ["evaluate", *words, "generate=greedy"]) == [0]
    assert (run_dir / "evaluate-jsonl.jsonl").exists()
    assert (run_dir / "evaluate-jsonl.jsonl.scores.json").exists()
    [record] = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert b"evaluate" in record.read_bytes()
    assert b"exact match" in record.read_bytes()


def test_a_killed_evaluation_goes_on(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, cut, rows = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl", tmp_path / ".cut.jsonl.rows"
    words = [*on_run(place), "generate.num_beams=3", "generate.batch_size=1"]
    assert run_distributed(call, 1, ["evaluate", *words, f"texts={whole}"]) == [0]
    with pytest.raises(AssertionError, match=r"exit codes|global rank 1"):
        run_distributed(call_until_killed, 2, [*words, f"texts={cut}", "topology=tp2"], rows, "evaluate")
    assert not cut.exists()
    assert run_distributed(call, 1, ["evaluate", *words, f"texts={cut}"]) == [0]
    assert cut.read_bytes() == whole.read_bytes()
    capfd.readouterr()
    assert run_distributed(call, 1, ["evaluate", *words, f"texts={cut}", "generate.num_beams=2"]) == [2]
    assert "cut.jsonl.about.json: generate.num_beams is 3 there and 2 in this run" in capfd.readouterr().err


def compute_answer_scores(model: torch.nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """[prompts, answers]: log-likelihoods, each answer run alone."""
    scores = []
    for prompt in prompts:
        for answer in answers:
            with torch.no_grad():
                log_probs = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores.append(sum(log_probs[place, token] for place, token in zip(places, answer, strict=True)))
    return torch.stack(scores).view(len(prompts), len(answers))


ANSWERS = [[5, 6, 7, 100], [5, 100], [9, 3, 100], [5, 6, 100], *([token, 100] for token in range(20, 40))]


def choose(options: dict, base: Path) -> list[list[int]]:
    gpt = build_shard(options, read_toy_config(base))
    load_hf_checkpoint(gpt, base)
    rows = choose_answers(gpt.requires_grad_(False), draw_prompts(9), ANSWERS, batch_size=2)
    dist.barrier()
    return rows


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2}], ids=str)
def test_the_likeliest_answer_is_that_of_transformers(options: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    best = compute_answer_scores(build_hf_model(), draw_prompts(9), ANSWERS).argmax(1).tolist()
    assert len(set(best)) > 1
    for rows in run_distributed(choose, count_processes(options), options, tmp_path):
        assert rows == [ANSWERS[index][:-1] for index in best]


@pytest.mark.parametrize("topology", few_of(["single", "tp2", "dp2"], "tp2"))
def test_labels_are_chosen_by_their_likelihood(topology: str, place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    path, num_processes = tmp_path / "out.jsonl", 1 if topology == "single" else 2
    words = ["evaluate", *on_run(place, "banking77", TASKS / "banking77.csv"), f"texts={path}"]
    assert run_distributed(call, num_processes, [*words, f"topology={topology}"]) == [0] * num_processes
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    record = json.loads((tmp_path / "out.jsonl.scores.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    end = tokenizer.eos_token_id
    with (TASKS / "banking77.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = sorted({label for _, label in rows})
    model = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(place / "base", dtype=torch.float32), place / "run/adapter"
    ).eval()
    prompts = [[*tokenizer(line["context"])["input_ids"], end] for line in lines]
    answers = [[*tokenizer(f" {label}")["input_ids"], end] for label in labels]
    expected = [labels[i] for i in compute_answer_scores(model, prompts, answers).argmax(1).tolist()]
    assert [line["text"] for line in lines] == expected
    right = sum(line["text"] == label for line, (_, label) in zip(lines, rows, strict=True))
    assert record["rows"][0]["values"]["accuracy"] == pytest.approx(100 * right / len(rows))
    assert f"the most likely of {len(labels)} labels" in record["notes"][-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predictions=PLACE/e2e.txt"], "2 of predictions, adapter and base_alone are set"),
        (["adapter=null"], "0 of predictions, adapter and base_alone are set; give predictions=FILE"),
        (["adapter=null", "base_alone=true"], "base_alone=true has no run's directory to write to; give texts=FILE"),
        (
            ["adapter=null", "predictions=PLACE/e2e.txt", "topology=tp2"],
            "which one process scores; use topology=single",
        ),
        (["adapter=PLACE/none"], "adapter=PLACE/none is not a directory"),
        (["adapter=PLACE/whole"], "is a run that trained the whole model; give model.checkpoint=PLACE/whole/model"),
        (["texts=PLACE/no/x"], "texts=PLACE/no/x cannot be written"),
        (["model=tiny", "model.checkpoint=null"], "model=tiny has no tokenizer"),
        (["generate.max_new_tokens=300"], "model.max_position_embeddings=256; shorten"),
        (["task.references=PLACE/none"], "task.references=PLACE/none is no file"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [*on_run(place), *(word.replace("PLACE", str(place)) for word in words)]
    assert run_distributed(call, 1, ["evaluate", *given]) == [2]
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert message.replace("PLACE", str(place)) in errors


def test_a_base_alone_is_scored_too(place: Path, tmp_path: Path) -> None:
    words = [*on_run(place), "adapter=null", "base_alone=true", f"texts={tmp_path / 'out.jsonl'}", "generate=greedy"]
    assert run_distributed(call, 1, ["evaluate", *words]) == [0]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["adapter"] for line in lines} == {None}
