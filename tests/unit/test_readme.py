"""README.md: its tables are those of the records, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_made_from_the_records() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme_tables.py", "--check"], timeout=60)
    assert done.returncode == 0, "run python tools/readme_tables.py"


def test_every_path_named_exists() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:lora_dist|tools|tests|launch|slurm|conf)/[\w./-]+)`", page)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
