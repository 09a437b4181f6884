"""`lora-dist adapters`: every adapter below a directory on one line, whole or not."""

import json
from pathlib import Path

import pytest
from hf_toy import build_run_config, draw_adapter_values, write_toy_checkpoint

from lora_dist.checkpoint.listing import format_table, list_adapters
from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.cli.main import main
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.targets import build_adapter_specs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy_base"))


@pytest.fixture
def store(model: ModelConfig, tmp_path: Path) -> Path:
    write(tmp_path / "runs" / "a" / "adapter", model, LoraConfig(rank=4), "e2e", {"valid_loss": 1.25})
    ranks = LoraConfig(rank=2, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 8})
    write(tmp_path / "runs" / "b", model, ranks, "dart", {"valid_loss": None, "bleu": 46.0})
    return tmp_path / "runs"


def write(directory: Path, model: ModelConfig, lora: LoraConfig, task: str, metrics: dict) -> None:
    specs = build_adapter_specs(lora, build_run_config(model).model)
    adapter = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    about = {"task": task, "step": 3, "metrics": metrics}
    write_adapter_directory(directory, adapter, model, about, base_fingerprint="sha256:0123456789abcdef")


def test_each_adapter_is_one_row(store: Path, model: ModelConfig) -> None:
    first, second = list_adapters(store)
    assert (first.adapter, first.task, first.rank, first.targets) == (str(store / "a/adapter"), "e2e", "4", "q,v")
    assert (first.base, first.metric, first.state) == (f"{model.name} 01234567", "valid_loss 1.25", "whole")
    size = (store / "a/adapter/adapter_model.safetensors").stat().st_size
    assert first.size == f"{size / 1e6:.2f} MB"
    assert json.loads((store / "a/adapter/manifest.json").read_text())["created"].startswith(first.date[:10])
    assert (second.task, second.rank, second.targets, second.metric) == ("dart", "2-8", "q,down", "bleu 46")


def test_damaged_and_foreign_ones_are_shown_and_other_manifests_are_not(store: Path) -> None:
    (store / "b/adapter_config.json").write_text("{}")
    (store / "c").mkdir()
    (store / "c/adapter_config.json").write_text("{}")
    (store / "checkpoint").mkdir()
    (store / "checkpoint/manifest.json").write_text('{"sha256": {}}')
    states = {row.adapter.rpartition("/")[2]: row.state for row in list_adapters(store)}
    assert states.keys() == {"adapter", "b", "c"}
    assert states["adapter"] == "whole"
    assert "adapter_config.json is damaged" in states["b"]
    assert states["c"] == "from elsewhere: import it"


def test_an_adapter_that_is_not_finite_is_not_whole(store: Path, model: ModelConfig) -> None:
    specs = build_adapter_specs(LoraConfig(rank=1), build_run_config(model).model)
    values = {name: value * float("nan") for name, value in draw_adapter_values(specs, model, "none").items()}
    adapter = Adapter(specs=specs, bias="none", values=values)
    write_adapter_directory(store / "n", adapter, model, {"task": "t"}, base_fingerprint="x")
    states = {row.adapter.rpartition("/")[2]: row.state for row in list_adapters(store)}
    assert "is not finite" in states.pop("n")
    assert set(states.values()) == {"whole"}


def test_the_table_has_a_header_and_aligned_columns(store: Path) -> None:
    header, *lines = format_table(list_adapters(store)).splitlines()
    assert header.split() == ["adapter", "task", "rank", "targets", "size", "base", "date", "metric", "state"]
    assert len(lines) == 2
    assert {line.index("whole") for line in lines} == {header.index("state")}


def test_the_verb_prints_the_table_or_says_what_is_wrong(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", f"directory={store}"]) == 0
    assert capsys.readouterr().out.splitlines() == format_table(list_adapters(store)).splitlines()
    (store.parent / "empty").mkdir()
    assert main(["adapters", f"directory={store.parent / 'empty'}"]) == 0
    assert "no adapters below" in capsys.readouterr().out
    assert main(["adapters", "directory=/nowhere"]) == 2
    assert capsys.readouterr().err == "error: directory=/nowhere is not a directory; give directory=DIR\n"
    assert main(["adapters", "optim.lr=1"]) == 2
    assert "unknown key optim" in capsys.readouterr().err


def test_the_verb_explains_only_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "--help"]) == 0
    text = capsys.readouterr().out
    assert "directory" in text
    assert "lora.rank" not in text
    assert main(["adapters", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == "directory: runs\n"
