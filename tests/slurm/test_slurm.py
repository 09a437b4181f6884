"""The job scripts on a real Slurm of two nodes: overrides arrive, time limits, lost nodes and scancel lose nothing."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pretend_gpu
import pytest
import yaml
from processes import run_distributed

from lora_dist.checkpoint.resume import find_newest_checkpoint
from lora_dist.cli.compose import compose_config
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.run import train

sys.path.insert(0, str(Path(__file__).parent))
from cluster import NODES, Cluster, find_obstacle

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
MEASURED = {"step_time_ms", "tokens_per_sec_per_gpu", "peak_memory_gib"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
TINY = ["experiment=debug/tiny_lora", "device=cpu"]
# Every process of a job runs this: each training step takes as many seconds as the file `pace` says, and before it
# starts to train each process makes a file `waiting-ID` and waits as long as there is a file `wait`.
SITECUSTOMIZE = """
import os, pathlib, sys, time
import lora_dist.optim

PACE = pathlib.Path(__file__).with_name("pace")
WAIT = PACE.with_name("wait")
compute_lr = lora_dist.optim.compute_lr

while WAIT.exists() and "preflight" not in sys.orig_argv:
    WAIT.with_name(f"waiting-{os.environ['SLURM_PROCID']}").touch()
    time.sleep(0.1)

def wait_and_compute_lr(*args, **options):
    time.sleep(float(PACE.read_text()) if PACE.exists() else 0.0)
    return compute_lr(*args, **options)

lora_dist.optim.compute_lr = wait_and_compute_lr
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(f"NO SLURM, the job scripts are not tested here: {obstacle}")
    root = Path(tempfile.mkdtemp(prefix="lora-slurm-"))
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root)


class Job:
    """One job of a script, submitted from `directory`."""

    def __init__(
        self, cluster: Cluster, directory: Path, words: list[str], *, pace: float = 0.0, **environ: str
    ) -> None:
        self.cluster, self.directory = cluster, directory
        (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.set_pace(pace)
        ours = {"PYTHON": sys.executable, "PYTHONPATH": str(directory), "LORA_DIST_ROOT": str(ROOT), "PET": "a cat"}
        self.id = cluster.sbatch(*words, cwd=directory, environ=ours | environ)
        self.run_dir = directory / "runs" / f"gpt3_lora-{self.id}"

    def set_pace(self, seconds: float) -> None:
        (self.directory / "pace").write_text(str(seconds))

    @property
    def state(self) -> str:
        return self.cluster.describe_job(self.id)["JobState"]

    @property
    def num_restarts(self) -> int:
        return int(self.cluster.describe_job(self.id)["Restarts"])

    @property
    def num_steps(self) -> int:
        """Steps of metrics.jsonl; 0 before there are any."""
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    @property
    def log(self) -> str:
        (file,) = self.directory.glob(f"*-{self.id}.out")
        return file.read_text()

    def wait_for(self, what: str, timeout_s: float) -> None:
        """Until the expression `what` over this job's properties is true; fails with the log where the job ends."""
        names = ("state", "num_restarts", "num_steps")
        try:
            self.cluster.wait_for(lambda: eval(what, {}, {name: getattr(self, name) for name in names}), timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}\n{self.log}") from None

    def wait_until_ended(self, timeout_s: float = 300.0) -> None:
        self.cluster.wait_for(lambda: self.state in ENDED, timeout_s)


def read_training(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def train_undisturbed(overrides: list[str], run_dir: Path, world_size: int) -> list[dict]:
    config = replace(compose_config([*overrides, "track=none"]), run_dir=str(run_dir))
    run_distributed(train, world_size, config)
    return read_training(run_dir)


@pytest.mark.parametrize("script", ["gpt3_lora", "gpt3_full_ft", "gpt3_compare"])
def test_sbatch_accepts_every_script(script: str, cluster: Cluster, tmp_path: Path) -> None:
    cluster.sbatch("--test-only", "--nodes=2", str(ROOT / "slurm" / f"{script}.sh"), cwd=tmp_path, environ={})


def test_overrides_arrive_as_they_were_typed_and_the_run_is_the_one_of_any_launcher(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET", "a cat")
    overrides = [
        *(*TINY, "topology=tp2_pp2", "track=wandb", "lora.target_modules=[q_proj, 'v_proj', \"o_proj\"]"),
        *("data.name=two  words", 'model.name="${oc.env:PET} & $HOME * \\\\ `x`"', "lora.rank_pattern={v_proj: 2}"),
    ]
    words = ["--nodes=2", "--ntasks-per-node=2", str(ROOT / "slurm" / "gpt3_lora.sh"), *overrides]
    job = Job(cluster, tmp_path, words)
    job.wait_until_ended()
    assert job.state == "COMPLETED", job.log
    expected = compose_config(overrides)
    name = f"gpt3_lora-{job.id}"
    changed = replace(expected, run_dir=f"runs/{name}", resume="auto", track=replace(expected.track, run_id=name))
    assert yaml.safe_load((job.run_dir / "config.yaml").read_text()) == asdict(changed)
    assert expected.model.name == "a cat & $HOME * \\\\ `x`"  # Hydra keeps a backslash before anything but a quote
    assert "preflight: 4 processes on 2 nodes, cpu" in job.log
    assert (job.run_dir / "adapter" / "adapter_model.safetensors").exists()
    assert list(job.run_dir.glob(f"wandb/offline-run-*-{name}"))
    assert read_training(job.run_dir) == train_undisturbed(overrides, tmp_path / "expected", 4)


def test_the_paper_s_job_on_nodes_of_v100s(cluster: Cluster, tmp_path: Path) -> None:
    """The script's own experiment, shrunk: fp16 on pretend GPUs, two to a node, pre-flight check included."""
    if obstacle := pretend_gpu.find_obstacle():
        pytest.skip(obstacle)
    overrides = ["debug=shrink", "device=cuda", "dtype=fp16", "hardware=v100_32gb", "topology=tp2_pp2"]
    script = str(ROOT / "slurm" / "gpt3_lora.sh")
    pretending = {"PYTHONPATH": str(ROOT / "tests" / "pretend_gpu" / "everywhere"), "DS_ACCELERATOR": "cuda"}
    words = ["--nodes=2", "--ntasks-per-node=2", script, *overrides]
    job = Job(cluster, tmp_path, words, PRETEND_CAPABILITY="7.0", **pretending)
    job.wait_until_ended()
    assert job.state == "COMPLETED", job.log
    assert "preflight: 4 processes on 2 nodes, pretended, at least 80.0 GiB free for" in job.log
    environment = yaml.safe_load((job.run_dir / "environment.json").read_text())
    assert environment["gpus"]["devices"][0]["capability"] == "7.0"
    assert (job.run_dir / "adapter" / "adapter_model.safetensors").exists()
    on_cpus = ["experiment=gpt3_175b_v100", "debug=shrink", "device=cpu", "topology=tp2_pp2", "loop.recompute=none"]
    expected = train_undisturbed(on_cpus, tmp_path / "expected", 4)
    losses = [[line["loss"] for line in lines[1:]] for lines in (read_training(job.run_dir), expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_time_limit_and_then_a_lost_node_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [*TINY, "loop.num_steps=150", "loop.save_every=5"]
    limits = ["--time=2", "--signal=USR1@60"]  # minutes; Slurm may send it up to a minute early
    words = ["--nodes=2", "--ntasks-per-node=1", *limits, str(ROOT / "slurm" / "gpt3_lora.sh"), *overrides]
    job = Job(cluster, tmp_path, words, pace=0.5)
    job.wait_for("num_restarts == 1", 200)
    cluster.set_time_limit(job.id, minutes=60)
    num_steps = job.num_steps
    assert f"stopped after step {num_steps} of 150, as asked" in job.log
    assert f"job {job.id}: stopped as asked; queued again" in job.log
    newest = find_newest_checkpoint(job.run_dir)
    assert newest is not None
    assert newest.name == f"step-{num_steps:06d}"

    job.wait_for(f"num_steps > {num_steps + 6}", 200)
    cluster.kill_node(NODES[1])
    job.wait_for("num_restarts == 2", 100)
    cluster.start_node(NODES[1])
    job.set_pace(0.0)
    job.wait_until_ended()
    assert job.state == "COMPLETED", job.log
    assert read_training(job.run_dir) == train_undisturbed(overrides, tmp_path / "expected", 2)


@pytest.mark.parametrize("what", ["step", "job"])
def test_tasks_that_are_terminated_before_they_train(what: str, cluster: Cluster, tmp_path: Path) -> None:
    """The job of a step that Slurm ends, as it may where a lost node came back, is queued again."""
    (tmp_path / "wait").touch()
    words = ["--nodes=2", "--ntasks-per-node=1", str(ROOT / "slurm" / "gpt3_lora.sh"), *TINY]
    job = Job(cluster, tmp_path, words)
    cluster.wait_for(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, 200)
    if what == "job":
        cluster.signal_job(job.id)
        job.wait_until_ended()
        cluster.wait_for(lambda: f"job {job.id}: end" in job.log, 30)
        assert (job.state, job.num_restarts) == ("CANCELLED", 0)
        assert f"job {job.id}: cancelled" in job.log
        return
    cluster.signal_job(f"{job.id}.1", "--signal=TERM")
    job.wait_for("num_restarts == 1", 100)
    (tmp_path / "wait").unlink()
    job.wait_until_ended()
    assert job.state == "COMPLETED", job.log
    assert f"job {job.id}: its tasks were terminated, the job was not; queued again" in job.log


def test_a_job_does_not_come_back_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--nodes=2", "--ntasks-per-node=1", str(ROOT / "slurm" / "gpt3_lora.sh"), *TINY, "loop.num_steps=1000"]
    job = Job(cluster, tmp_path, words, pace=0.2, LORA_DIST_MAX_RESTARTS="0")
    job.wait_for("num_steps >= 3", 200)
    cluster.signal_job(job.id, "--signal=USR1")
    job.wait_until_ended()
    assert (job.state, job.num_restarts) == ("FAILED", 0), job.log
    assert "stopped as asked; not queued again after 0 restarts (LORA_DIST_MAX_RESTARTS)" in job.log
    assert find_newest_checkpoint(job.run_dir) is not None


def test_scancel_saves_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--nodes=2", "--ntasks-per-node=1", str(ROOT / "slurm" / "gpt3_lora.sh"), *TINY, "loop.num_steps=1000"]
    job = Job(cluster, tmp_path, words, pace=0.2)
    job.wait_for("num_steps >= 3", 200)
    cluster.signal_job(job.id)
    job.wait_until_ended()
    cluster.wait_for(lambda: f"job {job.id}: end" in job.log, 30)
    assert (job.state, job.num_restarts) == ("CANCELLED", 0)
    assert f"stopped after step {job.num_steps} of 1000, as asked" in job.log
    newest = find_newest_checkpoint(job.run_dir)
    assert newest is not None
    assert newest.name == f"step-{job.num_steps:06d}"
    assert not list(tmp_path.glob(".lora_dist-stopped-*"))


def test_nodes_that_cannot_run_it_are_refused_before_anything_is_made(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--nodes=2", "--ntasks-per-node=1", str(ROOT / "slurm" / "gpt3_lora.sh"), "experiment=debug/tiny_lora"]
    job = Job(cluster, tmp_path, words)
    job.wait_until_ended()
    assert job.state == "FAILED"
    assert cluster.describe_job(job.id)["ExitCode"] == "2:0"
    assert f"{NODES[0]}, {NODES[1]}: Slurm gives 8 GPUs, but torch" in job.log
    assert not job.run_dir.exists()
