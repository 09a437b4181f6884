"""The adapter verbs as a user types them, on one process and on two: what they write, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from demo_runs import call
from hf_toy import compute_hf_logits, compute_peft_logits, draw_adapter_values, write_toy_checkpoint
from processes import run_distributed
from safetensors.torch import load_file

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.targets import build_adapter_specs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and two adapters of it."""
    model = write_toy_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    fingerprint = compute_base_fingerprint(model, 0)
    for task, rank, bias in (("one", 2, "none"), ("two", 3, "all")):
        specs = build_adapter_specs(LoraConfig(rank=rank, target_modules=["q_proj", "down_proj"]), model)
        adapter = Adapter(specs=specs, bias=bias, values=draw_adapter_values(specs, model, bias))
        write_adapter_directory(tmp_path / task, adapter, model, {"task": task}, base_fingerprint=fingerprint)
    return tmp_path


def on_base(place: Path) -> list[str]:
    return ["model=hf", f"model.checkpoint={place / 'base'}"]


@pytest.mark.parametrize(
    ("verb", "tp_size", "given", "dtype"),
    [
        ("merge", 2, [], torch.bfloat16),
        ("export", 1, ["format=hf_merged"], torch.bfloat16),
        ("merge", 1, ["dtype=fp32"], torch.float32),
    ],
)
def test_merging_writes_a_checkpoint_in_the_bases_dtype_or_another(
    verb: str, tp_size: int, given: list[str], dtype: torch.dtype, place: Path
) -> None:
    more = [f"topology.tp_size={tp_size}", *given]
    words = [verb, *on_base(place), f"adapter={place / 'two'}", f"output={place / 'merged'}", *more]
    assert run_distributed(call, tp_size, words) == [0] * tp_size
    assert {tensor.dtype for tensor in load_file(place / "merged/model.safetensors").values()} == {dtype}
    assert json.loads((place / "merged/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    expected = compute_peft_logits(place / "base", place / "two")
    assert (compute_hf_logits(place / "merged") - expected).abs().max() < 0.05 * expected.abs().max()
    assert run_distributed(call, 1, [*words, "topology.tp_size=1"]) == [2]


def test_files_go_out_and_come_back(place: Path) -> None:
    sources = {"peft": "", "peft_split": "", "loralib": "/lora.pt"}
    for format, file in sources.items():
        out, back = place / f"out_{format}", place / f"back_{format}"
        given = [*on_base(place), f"adapter={place / 'one'}", f"output={out}", f"format={format}"]
        assert run_distributed(call, 1, ["export", *given]) == [0]
        more = ["format=loralib"] if format == "loralib" else []
        given = [*on_base(place), f"source={out}{file}", f"output={back}", "task_name=back", *more]
        assert run_distributed(call, 1, ["import", *given]) == [0]
        raw = [(directory / "adapter_model.safetensors").read_bytes() for directory in (place / "one", back)]
        assert raw[0] == raw[1]
        assert json.loads((back / "manifest.json").read_text())["task"] == "back"
    assert run_distributed(
        call, 1, ["export", *given[:2], f"adapter={place / 'one'}", f"output={place / 'x'}", "format=bridge"]
    ) == [0]
    assert len(load_file(place / "x/adapter.safetensors")) == 2 * 2 * 4


def test_a_run_stands_for_its_adapter(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every verb takes the directory of the run that wrote one; a run without one says what it has."""
    (place / "run").mkdir()
    (place / "one").rename(place / "run/adapter")
    run = [*on_base(place), f"adapter={place / 'run'}"]
    assert run_distributed(call, 1, ["merge", *run, f"output={place / 'merged'}"]) == [0]
    assert run_distributed(call, 1, ["export", *run, f"output={place / 'out'}", "format=peft_split"]) == [0]
    assert "for that model use format=peft" in capfd.readouterr().out
    switch = [*on_base(place), f"adapters=[{place / 'run'},{place / 'run'}]", "seq_len=16", "num_repeats=1"]
    assert run_distributed(call, 1, ["switch", *switch]) == [0]
    (place / "whole/model").mkdir(parents=True)
    assert run_distributed(call, 1, ["merge", *run[:2], f"adapter={place / 'whole'}", f"output={place / 'x'}"]) == [2]
    assert f"trained the whole model; give model.checkpoint={place / 'whole/model'}" in capfd.readouterr().err


def test_switching_says_what_it_costs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapters = f"adapters=[{place / 'one'},{place / 'two'}]"
    words = ["switch", *on_base(place), adapters, "topology=tp2", "seq_len=16", "num_repeats=2"]
    assert run_distributed(call, 2, words) == [0, 0]
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("one forward pass of 1 x 16 tokens: ")
    assert [line.split(":")[0] for line in lines[1:3]] == [f"switched to {place / name}" for name in ("one", "two")]
    assert lines[3].endswith("every weight as before, bit for bit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge"], "adapter: not set; give adapter=..."),
        (["merge", "adapter=PLACE/none", "output=PLACE/x"], "none is not a directory; `lora-dist adapters"),
        (["merge", "adapter=PLACE/base", "output=PLACE/x"], "base has no manifest.json; `lora-dist import`"),
        (["merge", "adapter=PLACE/one", "output=PLACE/two"], "two exists already; give a new directory"),
        (["merge", "adapter=PLACE/one", "output=PLACE/x", "seed=1", "model=tiny"], "base_fingerprint is 'sha256:"),
        (["merge", "adapter=PLACE/one", "output=PLACE/x", "lora.rank=1"], "unknown key lora"),
        (["export", "adapter=PLACE/one", "output=PLACE/x", "format=gguf"], "format='gguf' is not one of peft, "),
        (["export", "adapter=PLACE/one", "output=PLACE/x", "topology.tp_size=2"], "reads and writes files alone"),
        (["export", "adapter=PLACE/two", "output=PLACE/x", "format=bridge"], "has trained biases (bias=all)"),
        (["import", "source=PLACE/none", "output=PLACE/x"], "none does not exist"),
        (["import", "source=PLACE/one", "output=PLACE/x", "alpha=3"], "alpha is in the file already"),
        (["import", "source=PLACE/one", "output=PLACE/x", "format=loralib"], "alpha is needed"),
        (["import", "source=PLACE/one", "output=PLACE/x", "drop=[nothing]"], "drop: 'nothing' matches no key"),
        (["switch", "adapters=[PLACE/one]"], "name two or more"),
        (["switch", "adapters=[PLACE/one,PLACE/two]", "seq_len=999"], "seq_len=999 exceeds"),
        (["switch", "adapters=[PLACE/one,PLACE/two]", "topology.pp_size=2"], "is timed on one stage; use 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verb, *rest = (word.replace("PLACE", str(place)) for word in words)
    base = [] if any(word.startswith("model=") for word in rest) else on_base(place)
    assert run_distributed(call, 1, [verb, *base, *rest]) == [2]
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert not (place / "x").exists()
