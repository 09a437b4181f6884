"""launch/adapters_example.sh from its first step to PEFT's check at its end, with fewer steps of training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_goes_through(tmp_path: Path) -> None:
    environ = os.environ | {"NUM_STEPS": "2", "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    script = ["bash", str(ROOT / "launch" / "adapters_example.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [json.loads(line) for line in (tmp_path / "out" / "mixed_texts.jsonl").read_text().splitlines()]
    assert [None if row["adapter"] is None else Path(row["adapter"]).name for row in texts] == [
        "describe",
        "parse",
        None,
    ]
    assert "PEFT's adapter changes the base's logits by" in done.stdout
