"""The shell scripts parse, and those a user calls refuse to go on after an error."""

import os
import shutil
import subprocess
import sys
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


STAND_INS = {
    "ssh": "echo 127.0.0.1",
    # As pdsh and ssh do: `%` read in each word, all words one line for a shell of another environment.
    "pdsh": """
        words=()
        for word in "${@:6}"; do
            word=${word//%%/$'\\1'} word=${word//%n/0} word=${word//%h/node0} word=${word//%u/me}
            words+=("${word//$'\\1'/%}")
        done
        shopt -s extglob
        env -i PATH="$PATH" bash -c "${words[*]/#*\\/python*([0-9.])/record}"
    """,
    "record": """printf '%s\\0' "$@" >words; env -0 >environment""",
    "lora-dist": "",
}
WORDS = [
    *("train", r"lora.target_modules=[.*\.q_proj]", "run_dir=/x/${model.name}", "a=$a;exit", 'it\'s=`b` & <"c">', ""),
    *(r"data.train=/d/$a \b.jsonl", 'data.system="x"; \'y\' ${z} `w` \\" ', "a=%h%%n 100%", "b=50%u", "c=d\n e\t"),
]


def run_multinode(
    directory: Path, hosts: int, *words: str, ssh: str = STAND_INS["ssh"], **environ: str
) -> subprocess.CompletedProcess[str]:
    """The script in a checkout of its own, of which the only part is launch/; what it starts are stand-ins."""
    if not (directory / "launch").exists():
        shutil.copytree(ROOT / "launch", directory / "launch")
    (directory / "hosts.txt").write_text("# comment\n\n" + "".join(f"node{host} slots=1\n" for host in range(hosts)))
    stand_ins = directory / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name, text in (STAND_INS | {"ssh": ssh}).items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{text}")
        (stand_ins / name).chmod(0o755)
    path = f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "HOME": str(directory), "HOSTFILE": "hosts.txt", **environ}
    script = directory / "launch" / "multinode.sh"
    return subprocess.run(["bash", script, *words], env=given, cwd=directory, capture_output=True, text=True)


def write_deepspeed(directory: Path, text: str) -> None:
    (directory / "bin").mkdir()
    (directory / "bin" / "deepspeed").write_text(f"#!/bin/bash\n{text}")
    (directory / "bin" / "deepspeed").chmod(0o755)


def test_words_and_settings_reach_the_nodes_of_a_hostfile_as_they_are(tmp_path: Path) -> None:
    """Through DeepSpeed's own launcher, pdsh and a shell; what is secret is in no command and stays in no file."""
    (tmp_path / ".deepspeed_env").write_text("MINE=1\nHF_HOME=/theirs")
    secret = 's3 "$cret" 100%'
    done = run_multinode(tmp_path, 2, *WORDS, WANDB_API_KEY=secret, HF_HUB_OFFLINE="0", HF_HOME="/mine", OTHER="1")
    assert done.returncode == 0, done.stderr
    got = (tmp_path / "words").read_text().split("\0")[:-1]
    assert got[got.index("lora_dist.cli.main") + 1 :] == WORDS
    lines = (tmp_path / "environment").read_text().split("\0")[:-1]
    environ = dict(line.split("=", maxsplit=1) for line in lines)
    assert environ["WANDB_API_KEY"] == secret
    assert (environ["CUDA_DEVICE_MAX_CONNECTIONS"], environ["HF_HUB_OFFLINE"]) == ("1", "0")
    assert (environ["MINE"], environ["HF_HOME"]) == ("1", "/theirs")
    assert "OTHER" not in environ
    assert "cret" not in done.stdout + done.stderr
    assert not list(tmp_path.glob(".lora_dist*"))


def test_a_sites_settings_may_read_what_is_not_set(tmp_path: Path) -> None:
    """As `module load` and conda's hooks do."""
    write_deepspeed(tmp_path, """printf '%s' "$FOUND" >found""")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    with (tmp_path / "launch" / "env.sh").open("a") as file:
        file.write('export FOUND="at $OF_NO_SITE"\n')
    done = run_multinode(tmp_path, 1, "train")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text() == "at "


def test_a_hostfile_of_one_node_has_no_shell_in_the_way(tmp_path: Path) -> None:
    write_deepspeed(tmp_path, """printf '%s\\0' "$@" >words""")
    assert run_multinode(tmp_path, 1, *WORDS).returncode == 0
    assert (tmp_path / "words").read_text().split("\0")[-len(WORDS) - 1 : -1] == WORDS


def test_a_hostfile_of_one_node_needs_no_ssh(tmp_path: Path) -> None:
    """DeepSpeed's own launcher, which starts its processes here, whatever the node is called."""
    (tmp_path / "lora_dist" / "cli").mkdir(parents=True)
    for name in ("lora_dist/__init__.py", "lora_dist/cli/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "lora_dist" / "cli" / "main.py").write_text(
        "import os, sys\nopen('words', 'w').write(' '.join([os.environ['MASTER_ADDR'], *sys.argv[1:]]))"
    )
    done = run_multinode(tmp_path, 1, "train", "run_dir=/x", PYTHONPATH=str(tmp_path), ssh="exit 1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text() == "127.0.0.1 train run_dir=/x"


def test_a_hostfile_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    write_deepspeed(tmp_path, "touch started")
    done = run_multinode(tmp_path, 1, "train", HOSTFILE="hots.txt")
    assert (done.returncode, done.stderr.partition(";")[0]) == (2, "error: HOSTFILE=hots.txt cannot be read")
    assert not (tmp_path / "started").exists()


def test_a_stop_reaches_deepspeed_and_leaves_no_settings(tmp_path: Path) -> None:
    stop = f"[ $PPID = {os.getpid()} ] || kill -TERM $PPID"  # the script, not these tests
    trap = "trap 'sleep 0.2; exit 5' TERM"
    write_deepspeed(tmp_path, f"{trap}; stat -c %a .lora_dist* >mode; {stop}; sleep 5 >&/dev/null & wait $!")
    assert run_multinode(tmp_path, 2, "train", WANDB_API_KEY="secret").returncode == 5
    assert (tmp_path / "mode").read_text() == "700\n"
    assert not list(tmp_path.glob(".lora_dist*"))
