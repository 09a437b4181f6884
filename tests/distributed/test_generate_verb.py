"""`lora-dist generate` as a user types it: what it prints and writes, at any topology, and what it refuses."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_toy import draw_adapter_values
from processes import run_distributed
from tiers import exhaustive
from transformers import AutoTokenizer, GPT2LMHeadModel

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.cli.compose import compose_config
from lora_dist.cli.main import main
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.targets import build_adapter_specs

DEMO = Path(__file__).parents[2] / "lora_dist" / "assets" / "demo_base"
CONTEXTS = ["name : The Vaults | Type : pub", "name : Aromi", "name : The Vaults | Type : pub"]
SHORT = ["generate.max_new_tokens=8", "generate.batch_size=2"]


def call(words: list[str], verb: str = "generate") -> int:
    """`lora-dist VERB WORDS` as one process of a job that a launcher started."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main([verb, *words])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two adapters of the demo base, one in a run's directory; the other has trained biases too."""
    model = compose_config([]).model
    fingerprint = compute_base_fingerprint(model, 0)
    for name, rank, bias in (("run/adapter", 2, "none"), ("other", 3, "none"), ("biased", 1, "all")):
        specs = build_adapter_specs(LoraConfig(rank=rank, alpha=1, target_modules=["q_proj", "up_proj"]), model)
        values = {key: value * rank for key, value in draw_adapter_values(specs, model, bias).items()}
        adapter = Adapter(specs=specs, bias=bias, values=values)
        write_adapter_directory(tmp_path / name, adapter, model, {"task": name}, base_fingerprint=fingerprint)
    (tmp_path / "biased.jsonl").write_text(json.dumps({"context": "x", "adapter": str(tmp_path / "biased")}))
    (tmp_path / "half.jsonl").write_text('{"context": "a\\ud83d"}\n')
    (tmp_path / "e2e.txt").write_text("".join(f"{context}||a text\n" for context in CONTEXTS))
    return tmp_path


def read_lines(path: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate_with_transformers(contexts: list[str], adapter: Path | None) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    texts = []
    for context in contexts:
        prompt = torch.tensor([[*tokenizer(context)["input_ids"], tokenizer.eos_token_id]])
        output = model.eval().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize(
    ("topology", "more"), [("single", []), ("tp2", []), ("pp2", ["generate.merge=true"]), ("dp2", [])]
)
def test_a_file_of_contexts_becomes_a_file_of_texts(topology: str, more: list[str], place: Path) -> None:
    output, adapter = place / "new" / "out.jsonl", place / "run"
    words = [f"generate.input={place / 'e2e.txt'}", f"generate.output={output}", f"adapter={adapter}", *SHORT, *more]
    num_processes = 1 if topology == "single" else 2
    assert run_distributed(call, num_processes, [*words, f"topology={topology}"]) == [0] * num_processes
    expected = generate_with_transformers(CONTEXTS, adapter / "adapter")
    assert expected[0] == expected[2] != expected[1]
    assert read_lines(output) == [
        {"context": context, "text": text, "adapter": str(adapter)}
        for context, text in zip(CONTEXTS, expected, strict=True)
    ]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.about.json"]


def call_until_killed(words: list[str], rows: Path, verb: str = "generate") -> None:
    """The same, ended by SIGKILL once a row is kept; whoever else runs loses its peer."""

    def watch() -> None:
        while not (rows.exists() and rows.read_bytes().count(b"\n") > 1):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        threading.Thread(target=watch, daemon=True).start()
    assert call(words, verb) == 0, "a peer is gone"


@pytest.mark.parametrize(("killed", "resumed"), [("dp2", "single"), *exhaustive(("tp2", "tp2"))])
@pytest.mark.parametrize(
    "how", [*exhaustive(["generate.num_beams=3"]), ["generate.temperature=0.9", "generate.seed=5"]]
)
def test_a_killed_job_goes_on(killed: str, resumed: str, how: list[str], place: Path) -> None:
    """The rows that were kept are not generated again, a half-written one is."""
    (place / "many.txt").write_text("".join(f"name : {number} {'x ' * (number % 7)}||text\n" for number in range(12)))
    output, whole, rows = place / "out.jsonl", place / "whole.jsonl", place / ".out.jsonl.rows"
    words = [f"generate.input={place / 'many.txt'}", f"adapter={place / 'run'}", *SHORT, *how]
    num_processes = 1 if resumed == "single" else 2
    in_one_go = [*words, f"generate.output={whole}", f"topology={resumed}"]
    assert run_distributed(call, num_processes, in_one_go) == [0] * num_processes
    words.append(f"generate.output={output}")
    with pytest.raises(AssertionError, match=r"exit codes|global rank 1"):
        run_distributed(call_until_killed, 2, [*words, f"topology={killed}"], rows)
    kept = rows.read_bytes()
    assert 1 < kept.count(b"\n") < 12
    assert not output.exists()
    rows.write_bytes(kept + b'{"row": 3, "te')
    for _ in range(2):  # the second time nothing is left to do
        assert run_distributed(call, num_processes, [*words, f"topology={resumed}"]) == [0] * num_processes
        assert output.read_bytes() == whole.read_bytes()
        assert not rows.exists()


def test_draws_in_fp32_are_the_same_at_any_topology(place: Path) -> None:
    """The packaged base is fp16, whose sums depend on the number of processes that form them."""
    texts, output = [], place / "drawn.jsonl"
    how = ["dtype=fp32", "generate.temperature=0.9", f"generate.input={place / 'e2e.txt'}", f"generate.output={output}"]
    for topology, num_processes in (("single", 1), ("tp2", 2)):
        words = [f"adapter={place / 'run'}", *how, *SHORT, f"topology={topology}"]
        assert run_distributed(call, num_processes, words) == [0] * num_processes
        texts.append(output.read_text())
        output.unlink()
        Path(f"{output}.about.json").unlink()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generate.no_repeat_ngram_size=3", "generate.no_repeat_ngram_size is 0 there and 3 in this run"),
        ("dtype=fp32", "dtype is 'float16' there and 'float32' in this run"),
        ("adapter=PLACE/other", "adapters is ['sha256:"),
        ("generate.input=PLACE/more.txt", "contexts is 'sha256:"),
    ],
)
def test_a_file_of_other_texts_is_refused(
    change: str, message: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "more.txt").write_text("name : Aromi||a text\n" * 3)
    output = place / "out.jsonl"
    words = [f"generate.input={place / 'e2e.txt'}", f"adapter={place / 'run'}", f"generate.output={output}", *SHORT]
    assert run_distributed(call, 1, words) == [0]
    before = output.read_bytes()
    capfd.readouterr()
    assert run_distributed(call, 1, [*words, change.replace("PLACE", str(place))]) == [2]
    errors = capfd.readouterr().err
    assert f"{output}.about.json: {message}" in errors
    assert errors.count("\n") == 1
    assert output.read_bytes() == before


def test_a_prompt_of_the_command_line_is_answered_on_it(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_distributed(call, 1, [f"generate.prompt={CONTEXTS[0]}", *SHORT]) == [0]
    assert capfd.readouterr().out.strip() == generate_with_transformers(CONTEXTS[:1], None)[0]


def test_trained_biases_need_no_merge(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"generate.prompt={CONTEXTS[0]}", f"adapter={place / 'biased'}", *SHORT]
    expected = generate_with_transformers(CONTEXTS[:1], place / "biased")[0]
    assert expected != generate_with_transformers(CONTEXTS[:1], None)[0]
    for more in ([], ["generate.merge=true"]):
        assert run_distributed(call, 1, [*words, *more]) == [0]
        assert capfd.readouterr().out.strip() == expected


def test_rows_of_another_base_format_are_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The base's files are the same, its weights are not."""
    words = [f"generate.input={place / 'e2e.txt'}", f"generate.output={place / 'out.jsonl'}", *SHORT]
    assert run_distributed(call, 1, words) == [0]
    assert run_distributed(call, 1, [*words, "model.base_format=fp8"]) == [2]
    assert "model.base_format is 'native' there and 'fp8' in this run" in capfd.readouterr().err


def test_each_row_of_a_file_names_its_adapter(place: Path) -> None:
    chosen = [str(place / "run"), None, str(place / "other")]
    rows = [{"context": c, "adapter": a} for c, a in zip(CONTEXTS, chosen, strict=True)]
    (place / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"generate.input={place / 'mixed.jsonl'}", f"generate.output={place / 'out.jsonl'}", *SHORT]
    adapters = f"adapters=[{place / 'run'},{place / 'other'}]"
    assert run_distributed(call, 2, [*words, adapters, "topology=tp2"]) == [0, 0]
    directories = [place / "run/adapter", None, place / "other"]
    expected = [
        generate_with_transformers([context], adapter)[0]
        for context, adapter in zip(CONTEXTS, directories, strict=True)
    ]
    assert expected[0] != expected[2]
    assert read_lines(place / "out.jsonl") == [row | {"text": text} for row, text in zip(rows, expected, strict=True)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give generate.input=FILE or generate.prompt='...', one of them"),
        (["generate.prompt=x", "adapter=PLACE/none"], "adapter=PLACE/none is not a directory"),
        (["generate.prompt=x", "adapter=PLACE"], "adapter=PLACE has no manifest.json"),
        (["generate.input=PLACE/biased.jsonl", "adapters=[PLACE/biased]"], "trained biases, which the rows of a batch"),
        (["generate.input=PLACE/half.jsonl"], "half.jsonl:1: broken UTF-8; correct the row"),
        (["generate.prompt=x", "generate.length_penalty=2000"], "generate.length_penalty=2000.0 must lie between -20"),
        (["generate.prompt=x", "adapters=[PLACE/other]"], "no row names one; use adapter=DIR"),
        (["generate.input=PLACE/none"], "generate.input=PLACE/none is no file"),
        (["generate.prompt=x", "generate.output=PLACE/e2e.txt"], "e2e.txt exists already; give a new file"),
        (["generate.prompt=x", "generate.max_new_tokens=300"], "model.max_position_embeddings=256; shorten"),
        (["generate.prompt=x", "model=tiny"], "model=tiny has no tokenizer"),
        (["generate.prompt=x", "generate.beams=3"], "unknown key generate.beams; did you mean generate.num_beams?"),
        (["generate.prompt=x", "generate.top_k=3"], "generate.top_k=3 has no effect without drawing"),
        (["generate.prompt=x", "topology.tp_size=2", "topology.sequence_parallel=true"], "set false"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_distributed(call, 1, [word.replace("PLACE", str(place)) for word in words]) == [2]
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert message.replace("PLACE", str(place)) in errors
