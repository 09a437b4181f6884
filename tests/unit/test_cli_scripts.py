"""The shell scripts parse, and those a user calls refuse to go on after an error."""

import subprocess
from pathlib import Path

import pytest

from lora_dist.bench.runner import check_bench
from lora_dist.cli.compose import compose_config

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    *sorted((ROOT / "tools").glob("*.sh")),
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert script.name == "env.sh" or "\nset -euo pipefail\n" in text


def test_the_gpu_suite_asks_for_benches_that_exist() -> None:
    """What no machine without a GPU can run is composed and checked here, key by key."""
    script = ROOT / "tools" / "gpu_suite.sh"
    listed = subprocess.run(["bash", script, "--list"], capture_output=True, text=True, check=True)
    benches = dict(line.split("\t", maxsplit=1) for line in listed.stdout.splitlines())
    assert len(benches) == 8
    for overrides in benches.values():
        check_bench(compose_config(overrides.split("\t")))


def test_the_gpu_suite_refuses_a_part_it_has_not() -> None:
    done = subprocess.run(["bash", ROOT / "tools" / "gpu_suite.sh", "all"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part all" in done.stderr


def test_every_version_is_pinned_but_torchs() -> None:
    pins = (ROOT / "launch" / "requirements-tested.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins if not pin.startswith("#"))
    assert not any(pin.startswith("torch==") for pin in pins), "torch is chosen by launch/install.sh"
