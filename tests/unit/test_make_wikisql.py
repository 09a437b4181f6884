"""tools/make_wikisql.py: text2sql-data's packing becomes files that the reader takes."""

import bz2
import json
import subprocess
import sys
from pathlib import Path

from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_wikisql.py"


def pack(sql: str, *sentences: tuple[str, str, dict[str, str]]) -> dict[str, object]:
    return {
        "sql": [sql],
        "variables": [{"name": "var0", "example": "x"}, {"name": "var1", "example": "7"}],
        "sentences": [
            {"question-split": split, "table-id": "1-2-3", "original": text, "variables": values}
            for split, text, values in sentences
        ],
    }


def test_questions_get_the_columns_of_their_table(tmp_path: Path) -> None:
    """Values are the sentence's own; one that is only in the query is known where the query is asked once."""
    both = (
        "SELECT COUNT TABLEalias0.HOME_TEAM_FIELD FROM TABLE AS TABLEalias0"
        ' WHERE TABLEalias0.YEAR_FIELD < var1 AND NO._FIELD = "var0" ;'
    )
    entries = [
        pack(both, ("dev", "How many?", {"var0": "y"})),
        pack(both, ("dev", "Twice?", {"var0": "y", "var1": "8"}), ("dev", "Unknown?", {"var0": "y"})),
        pack("SELECT ARENA_FIELD FROM table ;", ("train", "Which arena?", {})),
    ]
    source = tmp_path / "wikisql.json.bz2"
    source.write_bytes(bz2.compress(json.dumps(entries).encode()))
    done = subprocess.run([sys.executable, TOOL, source, tmp_path], capture_output=True, text=True, timeout=60)
    assert "dev: 2 questions" in done.stdout, done.stderr
    pairs = list(read_pairs((tmp_path / "dev.jsonl").read_bytes(), "wikisql", BadRows("dev.jsonl", "error")))
    assert [(pair.context, pair.target) for pair in pairs] == [
        (
            "[arena] [home team] [no.] [year] How many?",
            "SELECT COUNT([home team]) FROM table WHERE [year] < '7' AND [no.] = 'y'",
        ),
        (
            "[arena] [home team] [no.] [year] Twice?",
            "SELECT COUNT([home team]) FROM table WHERE [year] < '8' AND [no.] = 'y'",
        ),
    ]
    (train,) = read_pairs((tmp_path / "train.jsonl").read_bytes(), "wikisql", BadRows("train.jsonl", "error"))
    assert train.target == "SELECT [arena] FROM table"
