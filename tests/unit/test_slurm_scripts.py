"""The job scripts without Slurm: what they share, and what lib.sh makes of a user's words. Stand-ins record srun."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "slurm" / f"gpt3_{name}.sh" for name in ("lora", "full_ft", "compare")]
STAND_INS = {
    # One line a call, words between bars; the environment that matters last. Behaves as the file `srun.does` says.
    "srun": """
        IFS='|'
        set -- "$@" "$MASTER_ADDR:$MASTER_PORT $SRUN_CPUS_PER_TASK ${WORLD_SIZE-unset}"
        printf '%s\\n' "$*" >>srun.log
        IFS=' '
        source ./srun.does
    """,
    "scontrol": """
        if [ "$1" = show ]; then printf 'gpu03\\ngpu04\\n'; else echo "$*" >>scontrol.log; fi
    """,
    "timeout": 'shift; exec "$@"',
}


def run_script(directory: Path, *words: str, script: Path = SCRIPTS[0], does: str = "", **environ: str) -> str:
    """Exit code and log of the job; what was called is in srun.log and scontrol.log."""
    stand_ins = directory / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{text}")
        (stand_ins / name).chmod(0o755)
    (directory / "srun.does").write_text(does)
    given = {
        **{"PATH": f"{stand_ins}:{os.environ['PATH']}", "HOME": str(directory), "LORA_DIST_ROOT": str(ROOT)},
        **{"SLURM_JOB_ID": "20123", "SLURM_JOB_NAME": "my lora", "SLURM_JOB_NODELIST": "gpu[03-04]"},
        **{"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "5", "WORLD_SIZE": "9", **environ},
    }
    done = subprocess.run(["bash", script, *words], env=given, cwd=directory, capture_output=True, text=True)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def read_calls(directory: Path) -> list[list[str]]:
    return [line.split("|") for line in (directory / "srun.log").read_text().splitlines()]


def read_options(script: Path) -> dict[str, str]:
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return dict((line.removeprefix("#SBATCH --") + "=").split("=")[:2] for line in lines)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "slurm" / "lib.sh"], ids=lambda script: script.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_the_scripts_ask_for_the_same_but_for_name_and_nodes() -> None:
    options = [read_options(script) for script in SCRIPTS]
    assert [one.pop("job-name") for one in options] == ["gpt3_lora", "gpt3_full_ft", "gpt3_compare"]
    assert [one.pop("nodes") for one in options] == ["4", "24", "24"]
    assert options[0] == options[1] == options[2]
    assert {"requeue", "exclusive", "signal", "open-mode", "output"} <= options[0].keys()
    assert "gpus-per-task" not in options[0]  # a task that sees one GPU cannot reach its neighbours' memory


def test_defaults_and_words_reach_every_task_as_they_are(tmp_path: Path) -> None:
    words = ["lora.target_modules=[q_proj, v_proj]", "model.name=${oc.env:HOME} * $HOME", "a=b  c"]
    assert run_script(tmp_path, *words).startswith("0 ")
    check, train = read_calls(tmp_path)
    start = check.index("-m")
    name = "my_lora-20123"
    defaults = ["experiment=gpt3_175b_v100", f"run_dir=runs/{name}", f"track.run_id={name}", "resume=auto"]
    where = "gpu03:10123 5 unset"
    assert check[start - 1].endswith(".venv/bin/python")
    assert check[start:] == ["-m", "lora_dist.cli.main", "preflight", *defaults, "method=lora", *words, where]
    assert train[start:] == ["-m", "lora_dist.cli.main", "train", *defaults, "method=lora", *words, where]
    assert "--kill-on-bad-exit=1" in train


def test_what_the_user_names_has_no_default(tmp_path: Path) -> None:
    given = ["experiment=debug/tiny_lora", "run_dir=/x y", "resume=must"]
    run_script(tmp_path, *given)
    _, train = read_calls(tmp_path)
    assert train[train.index("train") + 1 : -1] == ["method=lora", *given]


def test_nothing_is_trained_where_a_node_is_refused(tmp_path: Path) -> None:
    assert run_script(tmp_path, does='case " $* " in *preflight*) exit 2 ;; esac').startswith("2 ")
    assert [("preflight" in call, "train" in call) for call in read_calls(tmp_path)] == [(True, False), (False, False)]
    assert not (tmp_path / "scontrol.log").exists()


def test_a_run_that_stopped_as_asked_is_queued_again(tmp_path: Path) -> None:
    assert run_script(tmp_path, does='touch "$LORA_DIST_STOP_FILE"').startswith("0 ")
    assert (tmp_path / "scontrol.log").read_text() == "requeue 20123\n"
    assert not list(tmp_path.glob(".lora_dist*"))


def test_a_cancelled_run_is_not(tmp_path: Path) -> None:
    text = run_script(tmp_path, does='touch "$LORA_DIST_STOP_FILE"; kill -TERM $PPID')
    assert "cancelled" in text
    assert not (tmp_path / "scontrol.log").exists()
    assert not list(tmp_path.glob(".lora_dist*"))


@pytest.mark.parametrize(("answer", "code", "again"), [("exit 0", "1", False), ("exit 1", "0", True)])
def test_a_failed_run_is_queued_again_where_a_node_no_longer_answers(
    answer: str, code: str, again: bool, tmp_path: Path
) -> None:
    text = run_script(tmp_path, does=f'case " $* " in *" true "*) {answer} ;; *preflight*) ;; *) exit 1 ;; esac')
    assert text.startswith(code)
    assert (tmp_path / "scontrol.log").exists() is again


@pytest.mark.parametrize(("cancel", "said"), [("", "queued again"), ("(sleep 1; kill -TERM $job) &", "cancelled")])
def test_terminated_tasks_are_queued_again_unless_the_job_is_cancelled(cancel: str, said: str, tmp_path: Path) -> None:
    """Whose script may be told a moment after its tasks have ended."""
    does = f'job=$PPID; case " $* " in *" true "* | *preflight*) ;; *) {cancel} exit 143 ;; esac'
    text = run_script(tmp_path, does=does)
    assert said in text
    assert (tmp_path / "scontrol.log").exists() is (said == "queued again")


def test_submitted_from_elsewhere(tmp_path: Path) -> None:
    text = run_script(tmp_path, LORA_DIST_ROOT="", SLURM_SUBMIT_DIR=str(tmp_path))
    assert text.startswith("2 ")
    assert "error: submit from the checkout, or set LORA_DIST_ROOT to it" in text
