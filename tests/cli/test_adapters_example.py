"""launch/adapters_example.sh to PEFT's check at its end, with fewer steps of training, where it stopped once before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import call
from processes import run_distributed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_the_example_goes_through_and_goes_on(tmp_path: Path) -> None:
    """It finds one adapter trained, one still to be, and the directories that it wrote last time."""
    out = tmp_path / "out (1)"
    words = ["train", "experiment=e2e_demo", "optim.lr=1e-2", "loop.num_steps=2", "track=none", "resume=auto"]
    words += ["topology=tp2", f"run_dir={out}/describe"]
    assert run_distributed(call, 2, words) == [0, 0]
    for name in ("describe_merged", "describe_peft"):
        (out / name).mkdir()
        (out / name / "config.json").write_text("of last time")
    environ = os.environ | {"NUM_STEPS": "2", "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    script = ["bash", str(ROOT / "launch" / "adapters_example.sh"), str(out)]
    done = subprocess.run(script, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PEFT's adapter changes the base's logits by" in done.stdout
    texts = [json.loads(line) for line in (out / "mixed_texts.jsonl").read_text().splitlines()]
    names = [None if row["adapter"] is None else Path(row["adapter"]).name for row in texts]
    assert names == ["describe", "parse", None]
