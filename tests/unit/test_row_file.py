"""A file of rows that outlives its writer: what it takes back, cuts off and refuses."""

import json
from pathlib import Path

import pytest

from lora_dist.checkpoint.row_file import RowFile

TEXT = "c\nc\u2028d\x85"
"""With every end of a line that Unicode has; JSON escapes the first alone."""


def open_rows(directory: Path, **identity: object) -> RowFile:
    return RowFile(path=directory / "new" / "out.jsonl", identity={"seed": 1, **identity}, num_rows=3)


def test_rows_come_back_in_any_order_until_the_file_is_whole(tmp_path: Path) -> None:
    assert open_rows(tmp_path).begin() == {}
    open_rows(tmp_path).append({2: TEXT, 0: "ä"})
    assert not open_rows(tmp_path).path.exists()
    assert open_rows(tmp_path).begin() == {2: TEXT, 0: "ä"}
    open_rows(tmp_path).append({1: ""})
    open_rows(tmp_path).finish([{"text": "ä"}, {"text": ""}, {"text": TEXT}])
    assert open_rows(tmp_path).begin() == {0: "ä", 1: "", 2: TEXT}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.jsonl", "out.jsonl.about.json"]


def test_a_half_written_row_is_cut_off_and_the_next_one_follows(tmp_path: Path) -> None:
    file = open_rows(tmp_path)
    file.begin()
    file.append({0: "a"})
    with file.rows_path.open("ab") as raw:
        raw.write('{"row": 1, "text": "ä'.encode()[:-1])
    assert file.begin() == {0: "a"}
    file.append({1: "b"})
    assert file.begin() == {0: "a", 1: "b"}


def test_a_row_that_has_no_room_names_its_file(tmp_path: Path) -> None:
    file = open_rows(tmp_path)
    file.begin()
    file.rows_path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"out\.jsonl\.rows cannot be written: .*; free space there"):
        file.append({0: "a"})


def test_rows_of_another_job_are_refused_with_both_values(tmp_path: Path) -> None:
    open_rows(tmp_path).begin()
    with pytest.raises(ValueError, match=r"out.jsonl.about.json: seed is 1 there and 2 in this run"):
        open_rows(tmp_path, seed=2).begin()


@pytest.mark.parametrize("name", ["out.jsonl", ".out.jsonl.rows"])
def test_a_file_that_says_not_what_it_answers_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} exists already; give a new file"):
        open_rows(tmp_path).begin()


@pytest.mark.parametrize("row", ["x", "[]", '{"row": 3, "text": "a"}', '{"row": true}', '{"row": 1, "text": null}'])
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    file = open_rows(tmp_path)
    file.begin()
    file.append({0: "a"})
    with file.rows_path.open("a") as raw:
        raw.write(f"{row}\n")
    with pytest.raises(ValueError, match=r"\.out\.jsonl\.rows:2 holds no (row|text).*; remove the file to start over"):
        file.begin()


def test_a_finished_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    file = open_rows(tmp_path)
    file.begin()
    file.path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ValueError, match="has 1 rows instead of 3; remove it to start over"):
        file.begin()
