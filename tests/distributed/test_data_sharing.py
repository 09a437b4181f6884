"""Examples that a job's processes make together are those that one makes alone, bad rows and refusals included."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chat_files import CHAT_VOCAB_SIZE, chat_directory
from data_files import build_config, write_pairs
from processes import run_distributed
from tiers import few_of

from lora_dist.config import DataConfig, PrefixConfig, RunConfig, TopologyConfig
from lora_dist.data import sharing
from lora_dist.data.examples import Examples
from lora_dist.data.sharing import encode_alone, open_sharing
from lora_dist.data.splits import load_splits
from lora_dist.mcore.parallel import open_topology

NUM_PROCESSES = 3
LONG = "name : x||" + "The Vaults " * 40


def load_together(config: RunConfig) -> list[Any]:
    """What `load_splits` gives on this process: examples as plain data, and counts."""
    size = dist.get_world_size()
    topology = TopologyConfig(dp_size=size)
    with (
        open_topology(topology, device=torch.device("cpu"), local_rank=0, seed=0) as opened,
        open_sharing(config.run_dir, opened) as share,
    ):
        assert (share is encode_alone) == (size == 1)
        try:
            splits = load_splits(config, share)
        except (ValueError, OSError) as error:
            return [type(error), str(error)]
        return [describe(split.examples, split.file) for split in splits if split is not None]


def describe(examples: Examples, file: Any) -> tuple[Any, ...]:
    arrays = (examples.tokens, examples.starts, examples.is_learnt)
    return (*(array.tolist() for array in arrays), *(str(a.dtype) for a in arrays), examples.has_slots, file)


def check(config: RunConfig, directory: Path) -> list[Any]:
    """The same on every process and on one alone; nothing is left behind."""
    directory.mkdir(exist_ok=True)
    config = replace(config, run_dir=str(directory))
    (alone,) = run_distributed(load_together, 1, config)
    assert run_distributed(load_together, NUM_PROCESSES, config) == [alone] * NUM_PROCESSES
    assert not list(directory.glob(".*"))
    return alone


def write_conversations(path: Path) -> Path:
    rows = []
    for number in range(11):
        question = {"role": "user", "content": f"What is {number}?" if number % 4 else "What is it? " * 30}
        rows.append({"messages": [question, {"role": "assistant", "content": "It is a pub."}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("num_pairs", few_of([1, 2, 3, 10], 2, 10))
@pytest.mark.parametrize("prefix", few_of([False, True], False))
def test_pairs(num_pairs: int, prefix: bool, tmp_path: Path) -> None:
    """Of processes without a row too."""
    path = str(write_pairs(tmp_path / "pairs.txt", num_pairs))
    data = DataConfig(name="d", format="e2e_text", train=path, valid=path, max_valid_examples=4, seq_len=40)
    config = build_config(data)
    if prefix:
        config = replace(config, method="prefix_embed", prefix=PrefixConfig(num_prefix=2, num_infix=1))
    train, valid = check(config, tmp_path / "run")
    assert (len(train[1]) - 1, len(valid[1]) - 1) == (num_pairs, min(4, num_pairs))


@pytest.mark.parametrize("most", [None, 5])
def test_conversations_that_are_left_out(most: int | None, tmp_path: Path) -> None:
    """They are counted on every process, and made up for."""
    path = str(write_conversations(tmp_path / "chats.jsonl"))
    data = DataConfig(name="d", format="chat", train=path, seq_len=100, on_bad_row="skip", max_train_examples=most)
    config = build_config(data)
    model = replace(config.model, family="llama", tokenizer=chat_directory(), vocab_size=CHAT_VOCAB_SIZE)
    config = replace(config, model=model)
    (train,) = check(config, tmp_path / "run")
    assert train[-1].num_examples == (most or 8)
    assert train[-1].skipped_rows == {"too long": 2 if most else 3}


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"The Vaults {number}"}) for number in range(7)))
    (train,) = check(build_config(DataConfig(name="d", format="text", train=str(path), seq_len=8)), tmp_path / "run")
    assert len(train[1]) > 7


@pytest.mark.parametrize("bad_lines", [[5], [2, 8], [9]])
def test_the_first_row_that_is_too_long_is_named(bad_lines: list[int], tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.txt", 9)
    rows = path.read_text().splitlines()
    for line in bad_lines:
        rows[line - 1] = LONG
    path.write_text("\n".join(rows))
    data = DataConfig(name="d", format="e2e_text", train=str(path), seq_len=40)
    kind, message = check(build_config(data), tmp_path / "run")
    assert kind is ValueError
    assert message.startswith(f"{path}:{bad_lines[0]}: too long")


def test_what_cannot_be_written_is_an_error_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        if path.stem == "1":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sharing.np, "savez", fail)
    data = DataConfig(name="d", format="e2e_text", train=str(write_pairs(tmp_path / "pairs.txt", 9)), seq_len=40)
    (tmp_path / "run").mkdir()
    told = run_distributed(load_together, NUM_PROCESSES, replace(build_config(data), run_dir=str(tmp_path / "run")))
    assert told == [told[0]] * NUM_PROCESSES
    assert told[0][0] is OSError
    assert "No space left on device" in told[0][1]
    assert not list((tmp_path / "run").glob(".*"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run" / ".examples-old").mkdir(parents=True)
    path = str(write_pairs(tmp_path / "pairs.txt", 3))
    check(build_config(DataConfig(name="d", format="e2e_text", train=path, seq_len=40)), tmp_path / "run")
