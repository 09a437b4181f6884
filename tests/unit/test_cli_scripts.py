"""The shell scripts parse, and those a user calls refuse to go on after an error."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert script.name == "env.sh" or "\nset -euo pipefail\n" in text


def test_every_version_is_pinned_but_torchs() -> None:
    pins = (ROOT / "launch" / "requirements-tested.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins if not pin.startswith("#"))
    assert not any(pin.startswith("torch==") for pin in pins), "torch is chosen by launch/install.sh"
