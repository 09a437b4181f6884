"""Generations of checkpoints: the newest whole one wins, damage is named, what a save leaves behind does not matter."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_toy import build_run_config

from lora_dist.checkpoint.identity import check_same, describe_run
from lora_dist.checkpoint.resume import _commit, _prune, find_newest_checkpoint, read_resume_state
from lora_dist.config import DataConfig, LoopConfig, LoraConfig, ModelConfig
from lora_dist.files.directories import open_new_directory, prepare_temporary, write_json
from lora_dist.files.safetensors_stream import open_writer
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.writing import write_lines

MODEL = ModelConfig(
    name="toy", num_layers=2, hidden_size=8, num_heads=2, ffn_hidden_size=16, vocab_size=11, max_position_embeddings=16
)


def commit(run_dir: Path, step: int) -> Path:
    """A generation with one small stage file."""
    target = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = prepare_temporary(target)
    with open_writer(temporary / "stage-00.safetensors", {"value/a": (3,)}, torch.float32) as writer:
        writer.write("value/a", torch.arange(3.0))
        hashes = {"stage-00.safetensors": writer.close()}
    _commit(temporary, target, hashes, {"step": step, "identity": {"loop.seed": 0}})
    return target


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert find_newest_checkpoint(tmp_path) is None


def test_the_newest_wins_and_steps_count_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 1_000_000):
        newest = commit(tmp_path, step)
    assert find_newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("name", ["stage-00.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, Path.unlink], ids=lambda damage: damage.__name__)
def test_damage_falls_back_to_the_generation_before(
    damage: object, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = commit(tmp_path, 1), commit(tmp_path, 2)
    if name == "manifest.json" and damage is flip_bit:
        content = json.loads((newest / name).read_text())
        content["sha256"]["state.json"] = "0" * 64
        (newest / name).write_text(json.dumps(content))
    elif name == "manifest.json" and damage is truncate:
        (newest / name).write_text((newest / name).read_text()[:-10])
    else:
        damage(newest / name)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert find_newest_checkpoint(tmp_path) == older
    assert "passing over checkpoint step-000002" in caplog.text
    assert name in caplog.text or "state.json" in caplog.text


def test_nothing_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (commit(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* is whole; remove that directory"):
        find_newest_checkpoint(tmp_path)


def test_an_interrupted_save_is_not_a_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    whole = commit(tmp_path, 1)
    temporary = prepare_temporary(tmp_path / "checkpoints" / "step-000002")
    (temporary / "stage-00.safetensors").write_bytes(b"half")
    assert find_newest_checkpoint(tmp_path) == whole
    commit(tmp_path, 3)
    _prune(tmp_path / "checkpoints", keep=2, step=3)
    assert sorted(path.name for path in whole.parent.iterdir()) == ["step-000001", "step-000003"]


def test_files_of_json_hold_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf"), {"c": (float("-inf"), None)}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, None, {"c": [None, None]}]}


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        commit(tmp_path, step)
    _prune(tmp_path / "checkpoints", keep=2, step=10)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000010"]


def test_pruning_keeps_what_is_saved_in_place_of_a_damaged_one(tmp_path: Path) -> None:
    """The run went on from step 4, since that of step 10 is no good."""
    for step in (4, 10, 6):
        commit(tmp_path, step)
    _prune(tmp_path / "checkpoints", keep=1, step=6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_pruning_counts_no_damaged_one_that_was_passed_over(tmp_path: Path) -> None:
    """The run went on from step 4 to 8; were 6 counted, it would stay in place of 4."""
    for step in (4, 6):
        commit(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000006" / "state.json").write_text("{}")
    assert find_newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000004"
    commit(tmp_path, 8)
    _prune(tmp_path / "checkpoints", keep=2, step=8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000008"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_one_that_cannot_be_read_is_not_passed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file system may fail for a moment; the newest steps would be lost."""
    commit(tmp_path, 4)
    newest = commit(tmp_path, 6)

    def refuse(path: Path, *_: object, **__: object) -> None:
        if path == newest / name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *_, **__)

    method = "read_bytes" if name == "manifest.json" else "open"
    real = getattr(Path, method)
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(PermissionError, match=name):
        find_newest_checkpoint(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    newest = commit(tmp_path, 1)
    content = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({"sha256": {"../../x": "0"} | content["sha256"]}))
    with pytest.raises(ValueError, match="none of the 1"):
        find_newest_checkpoint(tmp_path)


def interrupt(target: Path) -> None:
    with open_new_directory(target) as temporary:
        (temporary / "half").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with open_new_directory(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupt(target)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "old").read_text() == "old"


def fill_disk(target: Path, error: OSError) -> None:
    with open_new_directory(target):
        raise error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space there, then"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")],
)
def test_no_room_is_said_with_the_target_and_a_remedy(number: int, remedy: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(OSError, match=rf"model cannot be written: \[Errno {number}\] .*; .*{remedy}.* command again"):
        fill_disk(target, OSError(number, os.strerror(number)))
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'tokenizer\.json'$"):
        fill_disk(target, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "tokenizer.json"))
    assert not any(tmp_path.iterdir())


def list_lines_to_a_full_disk() -> Iterator[dict]:
    yield {"row": 0}
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_for_lines_names_their_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"answers\.jsonl cannot be written: .*; free space there"):
        write_lines(tmp_path / "answers.jsonl", list_lines_to_a_full_disk())
    assert not any(tmp_path.iterdir())


def describe(lora: LoraConfig, *, seq_len: int = 8, sha256: str = "aa", **loop: int) -> dict:
    data = DataConfig(name="x", format="fake", seq_len=seq_len)
    config = build_run_config(MODEL, lora, data=data, loop=LoopConfig(micro_batch_size=2, **loop))
    specs = build_adapter_specs(lora, MODEL)
    return describe_run(config, specs, base_fingerprint="seed:0", data_hashes={"train": sha256}, dp_size=2)


OURS = LoraConfig(rank=4)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (describe(LoraConfig(rank=2)), "lora.layers.0.q_proj.lora_rank is 2 there and 4 in this run"),
        (describe(LoraConfig(rank=4, alpha=8)), "alpha is 8 there and 32"),
        (describe(LoraConfig(rank=4, target_modules=["q"])), "lora.layers.0.v_proj is None there and"),
        (describe(LoraConfig(rank=4, bias="all")), "lora.bias is 'all' there and 'none'"),
        (describe(OURS, seed=3), "loop.seed is 3 there and 0"),
        (describe(OURS, global_batch_size=8), "loop.global_batch_size is 8 there and 4"),
        (describe(OURS, seq_len=4), "data.seq_len is 4 there and 8"),
        (describe(OURS, sha256="bb"), "'bb' there and 'aa' in this run (a hash of the content of data.train)"),
    ],
)
def test_a_run_resumes_only_itself(other: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the same") as caught:
        check_same(describe(OURS), other, tmp_path)
    assert named in str(caught.value)


def test_what_may_change_does_not_count(tmp_path: Path) -> None:
    ours = describe(OURS)
    assert json.loads(json.dumps(ours)) == ours
    check_same(ours, describe(OURS, num_steps=7, global_batch_size=4), tmp_path)


def test_the_stored_identity_is_checked(tmp_path: Path) -> None:
    path = commit(tmp_path, 5)
    assert read_resume_state(path, {"loop.seed": 0})["step"] == 5
    with pytest.raises(ValueError, match=r"loop\.seed is 0 there and 1 in .*: give what that run was given, or anoth"):
        read_resume_state(path, {"loop.seed": 1})
