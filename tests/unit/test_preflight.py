"""What the check of all nodes needs to hold, and how it words what it finds; the meeting itself with real processes."""

import json
import os
import socket
from pathlib import Path

import pytest
from processes import run_distributed

from lora_dist import preflight
from lora_dist.cli.compose import compose_config
from lora_dist.config import RunConfig
from lora_dist.needed_bytes import compute_needed_bytes
from lora_dist.preflight import Facts, check_job, find_problems, make_probe, measure_inputs

GIB = 2**30


def build_facts(node: str, **changed: object) -> Facts:
    facts = {"device": "V100", "free_bytes": 32 * GIB, "needed_bytes": 11 * GIB, "versions": {"torch": "2.10"}}
    return Facts(node=node, **{**facts, **changed})


def compose_175b(*overrides: str) -> RunConfig:
    return compose_config(["experiment=gpt3_175b_v100", "model.checkpoint=/base", "data.train=/data", *overrides])


def test_needed_bytes_are_the_weights_of_the_stage() -> None:
    lora = [compute_needed_bytes(compose_175b(), global_rank, 32) for global_rank in range(32)]
    assert len(set(lora)) == 3  # first and last stage hold the embedding and what is theirs alone, TP ranks the same
    assert 2 * 174.5e9 < sum(lora) < 2 * 176.5e9
    assert max(lora) / GIB < 10.5


def test_full_fine_tuning_needs_gradients_masters_and_moments_too() -> None:
    def compute(num_replicas: int, *overrides: str) -> float:
        config = compose_175b("experiment=gpt3_175b_v100_full", *overrides)
        return compute_needed_bytes(config, 8 * num_replicas, 192 * num_replicas) / (12 * 96 * 12288**2 / 192)

    assert compute(1) == pytest.approx(2 + 2 + 12, rel=1e-3)
    assert compute(4) == pytest.approx(2 + 2 + 3, rel=1e-3)
    assert compute(4, "zero.stage=2") == pytest.approx(2 + 0.5 + 3, rel=1e-3)
    assert compute(4, "zero.stage=0", "dtype=fp32") == pytest.approx(4 + 4 + 8, rel=1e-3)
    assert compute(4, "zero.offload_optimizer=true") == pytest.approx(2 + 2, rel=1e-3)


def test_what_a_killed_check_left_is_taken_away(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".preflight-1", ".preflight-2", "adapter"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    probe = make_probe(tmp_path)
    assert set(tmp_path.iterdir()) == {new, other, probe}


def test_a_plan_of_the_job_says_it_better(tmp_path: Path) -> None:
    job = {"method": "lora", "recompute": "full", "tp_size": 8, "pp_size": 4, "dp_size": 2}
    peaks = [{"pp_ranks": alike, "peak_bytes": peak} for alike, peak in (([0], 7), ([1, 2], 6), ([3], 8))]
    (tmp_path / "plan.json").write_text(json.dumps({"jobs": [{**job, "dp_size": 1}, {**job, "processes": peaks}]}))
    config = compose_175b(f"plan.file={tmp_path}/plan.json", "loop.recompute=full")
    assert [compute_needed_bytes(config, 16 * pp_rank, 64) for pp_rank in range(4)] == [7, 6, 6, 8]
    with pytest.raises(ValueError, match=r"no job with .* dp_size=4, tp_size=8, cp_size=1, pp_size=4, recompute=full"):
        compute_needed_bytes(config, 0, 128)
    auto = compose_175b(f"plan.file={tmp_path}/plan.json", "loop.recompute=auto")
    assert [compute_needed_bytes(auto, 16 * pp_rank, 64) for pp_rank in range(4)] == [7, 6, 6, 8]
    older = [{"pp_rank": pp_rank, "peak_bytes": 7} for pp_rank in (0, 1, 3)]
    (tmp_path / "older.json").write_text(json.dumps({"jobs": [{**job, "processes": older}]}))
    with pytest.raises(ValueError, match=r"older.json plans no job with .*; write it with `lora-dist plan`"):
        compute_needed_bytes(compose_175b(f"plan.file={tmp_path}/older.json", "loop.recompute=full"), 0, 64)
    with pytest.raises(ValueError, match=r"plan.file=/nowhere cannot be read as a plan.json"):
        compute_needed_bytes(compose_175b("plan.file=/nowhere"), 0, 32)


def test_equal_nodes_have_no_problem() -> None:
    everyone = [build_facts("n1"), build_facts("n1", versions={}), build_facts("n2")]
    assert find_problems(everyone) == []


def test_a_problem_is_told_once_with_its_nodes() -> None:
    everyone = [build_facts(f"n{index // 2}", problems=["no driver"]) for index in range(40)]
    (problem,) = find_problems(everyone)
    assert problem == "n0, n1, n2, n3, n4, n5, n6, n7 and 12 more: no driver"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"versions": {"torch": "2.9"}}, "torch differs: 2.10 on n1, n2 / 2.9 on n3"),
        ({"versions": {"torch": "2.10", "driver": "580"}}, "driver differs: nothing on n1, n2 / 580 on n3"),
        ({"sizes": {"data.train=/x": -1}}, "data.train=/x differs: 7 bytes on n1, n2 / not there on n3"),
        ({"device": "cpu"}, "device differs: gpu on n1, n2 / cpu on n3"),
    ],
)
def test_nodes_that_differ_are_named_with_both_values(changed: dict, expected: str) -> None:
    everyone = [build_facts(node, sizes={"data.train=/x": 7}) for node in ("n1", "n2")]
    assert find_problems([*everyone, build_facts("n3", **{"sizes": {"data.train=/x": 7}, **changed})]) == [expected]


def test_inputs_are_measured(tmp_path: Path) -> None:
    (tmp_path / "part").write_text("12345")
    config = compose_175b(f"model.checkpoint={tmp_path}", f"data.train={tmp_path}/part", "data.valid=/nowhere")
    assert measure_inputs(config) == {
        f"model.checkpoint={tmp_path}": 5,
        f"data.train={tmp_path}/part": 5,
        "data.valid=/nowhere": -1,
    }


def check(run_dirs: list[str], free_bytes: int, gpus: str, port: int) -> str | None:
    """The report or the refusal; process k is on node k and sees `run_dirs[k]`."""
    import os

    import torch.distributed as dist

    global_rank = dist.get_rank()
    os.environ.update(RANK=str(global_rank), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SLURMD_NODENAME=f"n{global_rank + 1}")
    if gpus:
        os.environ["SLURM_GPUS_ON_NODE"] = gpus
    preflight._SECONDS_TO_SEE_A_FILE = 0.2
    preflight.psutil.virtual_memory = lambda: type("Memory", (), {"available": free_bytes})
    preflight._find_existing = lambda path: Path(run_dirs[global_rank])
    config = compose_config(["experiment=debug/tiny_lora", f"run_dir={run_dirs[global_rank]}"])
    if global_rank > 0:  # another node's disk under the same path
        preflight.Path = lambda path: Path(str(path).replace(run_dirs[0], run_dirs[global_rank]))
    try:
        return check_job(config)
    except ValueError as error:
        return str(error)


def run_check(*run_dirs: Path, free_bytes: int = GIB, gpus: str = "") -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, *others = run_distributed(check, 2, [str(path) for path in run_dirs], free_bytes, gpus, port)
    assert others == [None]
    assert not any(list(path.iterdir()) for path in run_dirs)
    return first


def test_processes_meet_and_the_first_reports(tmp_path: Path) -> None:
    report = run_check(tmp_path, tmp_path)
    assert report.startswith(
        "preflight: 2 processes on 2 nodes, cpu, at least 1.0 GiB free for 275.5 KiB or more that it takes"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"free_bytes": 1000}, "n1, n2: cpu 0 has 1000 B free, this process needs more than 275.5 KiB; free it"),
        ({"gpus": "8"}, "n1, n2: Slurm gives 8 GPUs, but torch"),
    ],
)
def test_what_every_node_lacks(options: dict, expected: str, tmp_path: Path) -> None:
    assert run_check(tmp_path, tmp_path, **options).startswith(expected)


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    expected = f"n2: {tmp_path}/two is not the folder that process 0 sees; give a run_dir that all nodes share"
    assert run_check(tmp_path / "one", tmp_path / "two") == expected
