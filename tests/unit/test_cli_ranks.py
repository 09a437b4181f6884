"""Who started this process: nobody, torchrun or srun."""

import pytest

from lora_dist.cli.ranks import adopt_ranks, become_single_process, first_slurm_node, get_job_id

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_started_bare() -> None:
    assert adopt_ranks({}) is None


def test_torchrun_ranks_are_taken_as_they_are() -> None:
    environ = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **SRUN}
    before = dict(environ)
    assert adopt_ranks(environ) == 4
    assert environ == before


def test_srun_ranks_become_torch_ranks() -> None:
    environ = dict(SRUN)
    assert adopt_ranks(environ) == 16
    assert {key: environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        **{"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"},
        **{"MASTER_ADDR": "gpu03", "MASTER_PORT": str(10000 + 123456 % 20000)},
    }


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_or_a_single_task_is_started_bare(change: dict[str, str]) -> None:
    environ = {**SRUN, **change}
    assert adopt_ranks(environ) is None
    assert "RANK" not in environ


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="WORLD_SIZE is set but RANK is not"):
        adopt_ranks({"WORLD_SIZE": "2"})


def test_single_process_gets_everything_torch_asks_for() -> None:
    environ: dict[str, str] = {}
    become_single_process(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-04,7],login1", "gpu03"), ("a-b[9]", "a-b9")]
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_slurm_node(nodes) == first


@pytest.mark.parametrize(
    ("environ", "job_id"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "none"}, None),
        ({"TORCHELASTIC_RUN_ID": "abc", "SLURM_JOB_ID": "7"}, "abc"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "7"}, "7"),
    ],
)
def test_job_id(environ: dict[str, str], job_id: str | None) -> None:
    assert get_job_id(environ) == job_id
