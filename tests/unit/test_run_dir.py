"""What a run may write, and what it must leave alone."""

from pathlib import Path

import pytest
import yaml

from lora_dist.cli.compose import compose_config
from lora_dist.run_dir import check_run_dir, prepare_run_dir


def test_prepare_makes_the_directory_and_writes_the_configuration(tmp_path: Path) -> None:
    config = compose_config([f"run_dir={tmp_path}/a/b", "lora.rank=8"])
    run_dir = prepare_run_dir(config)
    assert [entry.name for entry in run_dir.iterdir()] == ["config.yaml"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["lora"]["rank"] == 8


def test_a_directory_with_contents_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty .precious.txt.*resume=auto.*another run_dir"):
        prepare_run_dir(compose_config([f"run_dir={tmp_path}"]))
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("precious.txt", "mine")]


def test_what_is_no_run_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no config.yaml"):
        check_run_dir(tmp_path, "auto")


def test_resume_auto_starts_or_continues_and_must_needs_a_checkpoint(tmp_path: Path) -> None:
    check_run_dir(tmp_path, "auto")
    (tmp_path / "config.yaml").write_text("")
    check_run_dir(tmp_path, "auto")
    with pytest.raises(ValueError, match=r"resume=must, but .* holds no checkpoint"):
        check_run_dir(tmp_path, "must")
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    check_run_dir(tmp_path, "must")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"is not a directory"):
        check_run_dir(file, "none")
    with pytest.raises(ValueError, match=r"cannot be made: .*file is not a directory"):
        check_run_dir(file / "run", "none")


def test_a_directory_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_dist.run_dir.os.access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(ValueError, match=r"cannot be written: no permission in"):
        check_run_dir(tmp_path / "run", "none")


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_what_a_run_goes_on_writing_must_be_writable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    check_run_dir(tmp_path, "auto")
    monkeypatch.setattr("lora_dist.run_dir.os.access", lambda path, _: path.name != name)
    with pytest.raises(ValueError, match=rf"cannot be written: no permission in .*{name}; give another run_dir"):
        check_run_dir(tmp_path, "auto")
