"""launch/adapters_example.sh from its first step to PEFT's check at its end, with fewer steps of training; twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_example_goes_through_and_goes_on(tmp_path: Path) -> None:
    """The second call finds one adapter trained, one still to be, and the directories that the first wrote last."""
    out = tmp_path / "out (1)"
    environ = os.environ | {"NUM_STEPS": "2", "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    script = ["bash", str(ROOT / "launch" / "adapters_example.sh"), str(out)]
    for call in ("first", "second"):
        done = subprocess.run(script, env=environ, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, call + done.stdout + done.stderr
        assert "PEFT's adapter changes the base's logits by" in done.stdout
        texts = [json.loads(line) for line in (out / "mixed_texts.jsonl").read_text().splitlines()]
        names = [None if row["adapter"] is None else Path(row["adapter"]).name for row in texts]
        assert names == ["describe", "parse", None]
        shutil.rmtree(out / "parse" / "adapter")
        (out / "mixed_texts.jsonl").unlink()
