"""GPT-3 175B planned whole: what it costs to plan, the paper's figures, the fewest GPUs that first principles allow."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.plan.job import GIB, execute_all

EXPERIMENT = "experiment=gpt3_175b_v100"
MAX_CPU_SECONDS, MAX_BYTES = 2 * 180, 4 * GIB
"""Three minutes of two cores."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.exhaustive
def test_both_methods_and_all_stages(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lora_dist.cli.main", "plan", EXPERIMENT, f"run_dir={tmp_path / 'run'}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_SECONDS
    assert 3 * after.ru_maxrss * 1024 < MAX_BYTES, "one process that waits and two that execute"
    jobs = {
        (job["method"], job["recompute"]): job for job in json.loads((tmp_path / "run/plan.json").read_text())["jobs"]
    }
    assert {key: job["fits"] for key, job in jobs.items()} == {
        ("lora", "none"): True, ("lora", "full"): True, ("full", "none"): False, ("full", "full"): False,
    }  # fmt: skip
    lora, full = jobs["lora", "full"], jobs["full", "full"]
    assert lora["num_trainable"] == 18_874_368
    assert full["state_bytes"] == pytest.approx(16 * 174.6e9, rel=0.02)
    # The paper's 43.1 / 32.5 tokens a second is the ratio of FLOPs with every layer recomputed.
    assert full["flops"] / lora["flops"] == pytest.approx(43.1 / 32.5, rel=0.01)
    assert "349 GB -> 37.75 MB (36.0 MiB)" in printed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.exhaustive
def test_the_fewest_v100s() -> None:
    """12 with full recomputation (TP4 x PP3, where nothing less does), 16 without (TP8 x PP2)."""
    config = compose_config([EXPERIMENT, "data=fake", "data.seq_len=2048", "loop.global_batch_size=16"], on_paper=True)
    assert config.hardware is not None
    tasks = []
    for tp_size, pp_size, recompute in ((4, 3, "full"), (4, 3, "none"), (8, 2, "none")):
        topology = replace(config.topology, tp_size=tp_size, pp_size=pp_size, dp_size=1)
        loop = replace(config.loop, recompute=recompute)
        tasks.append((replace(config, topology=topology, loop=loop), tp_size * pp_size, 0))
    peaks = [process.peak_bytes / GIB for process in execute_all(tasks, 2)]
    assert [peak <= config.hardware.available_gib for peak in peaks] == [True, False, True]
