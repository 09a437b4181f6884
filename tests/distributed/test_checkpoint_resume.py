"""Resumed runs: bit for bit what an uninterrupted run does, and the same training at another topology or ZeRO stage."""

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from processes import run_distributed
from safetensors.torch import load_file
from tiers import exhaustive
from toy import Case, build_batches, build_case, gather_whole

from lora_dist.checkpoint.resume import find_newest_checkpoint, load_checkpoint, save_checkpoint
from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.zero.engine import build_zero_engine

NUM_STEPS, NUM_STEPS_BEFORE = 4, 2
# The gradient of a key's bias is zero but for rounding, which Adam would blow up to whole steps under a small eps.
OPTIM = OptimConfig(lr=3e-3, clip_grad_norm=0.5, weight_decay=0.1, eps=1e-4)
LORA = Case(dtype=torch.float32, lora=LoraConfig(rank=3, target_modules=["all"], dropout=0.2, bias="all"))
FULL = Case(dtype=torch.float32, method="full")
IDENTITY = {"loop.seed": 0, "lora": {"layers.0.q_proj": {"lora_rank": 3}}}

Trained = tuple[list[float], dict[str, torch.Tensor]]


def train(case: Case, stage: int, run_dir: Path, first_step: int, last_step: int, save_at: int | None) -> Trained:
    """Steps `first_step` to `last_step`, continuing `run_dir`'s newest checkpoint unless at 0; losses, whole state.

    A checkpoint is written after `save_at` steps.
    """
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=stage),
        optim=OPTIM,
        micro_batch_size=1,
        dtype=case.dtype,
        topology=topology,
    )
    common = {"engine": zero, "trainable": trainable, "topology": topology, "identity": IDENTITY}
    if first_step:
        path = find_newest_checkpoint(run_dir)
        assert path is not None
        content = load_checkpoint(path, **common)
        assert (content["step"], content["state"]["valid_loss_before"]) == (first_step, 1.5)
    engine = Engine(gpt, zero, trainable, topology, seed=0)
    losses = []
    for step in range(first_step, last_step + 1):
        if step == save_at:
            save_checkpoint(run_dir, step=step, state={"valid_loss_before": 1.5}, keep=2, **common)
        if step < last_step:
            losses.append(engine.train_step(build_batches(topology, seed=step), step=step, lr=OPTIM.lr).loss)
    assert zero.num_steps == last_step
    whole = {}
    for one in trainable:
        for key, local in zero.read_state(one).items():
            whole[f"{key}/{one.name}"] = gather_whole(local, one, topology)
    return losses, whole


def resume(case: Case, stage: int, run_dir: Path) -> list[Trained]:
    """The remaining steps from the checkpoint in `run_dir`, in new processes."""
    return run_distributed(train, case.world_size, case, stage, run_dir, NUM_STEPS_BEFORE, NUM_STEPS, None)


SAME_TOPOLOGY = [
    ({"tp_size": 2, "dp_size": 2}, 3),
    ({"tp_size": 2, "pp_size": 2}, 1),
    *exhaustive(
        ({"tp_size": 2, "dp_size": 2}, 0),
        ({"tp_size": 2, "dp_size": 2}, 1),
        ({"tp_size": 2, "dp_size": 2, "sequence_parallel": True}, 2),
        ({"cp_size": 2, "dp_size": 2}, 1),
    ),
]


@pytest.mark.parametrize(("options", "stage"), SAME_TOPOLOGY, ids=lambda value: str(value).replace("'", ""))
@pytest.mark.parametrize("case", [LORA, FULL], ids=lambda case: case.method)
def test_resumed_is_uninterrupted_bit_for_bit(case: Case, options: dict, stage: int, tmp_path: Path) -> None:
    case = replace(case, **options)
    expected = run_distributed(train, case.world_size, case, stage, tmp_path, 0, NUM_STEPS, NUM_STEPS_BEFORE)
    results = resume(case, stage, tmp_path)
    for (losses, whole), (expected_losses, expected_whole) in zip(results, expected, strict=True):
        assert losses == expected_losses[NUM_STEPS_BEFORE:]
        assert whole.keys() == expected_whole.keys()
        assert all(torch.equal(whole[name], expected_whole[name]) for name in whole)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trained, Path]]:
    """One process without ZeRO, and the run directory of its checkpoint."""
    runs = {}
    for case in (LORA, FULL):
        run_dir = tmp_path_factory.mktemp(case.method)
        runs[case.method] = (run_distributed(train, 1, case, 0, run_dir, 0, NUM_STEPS, NUM_STEPS_BEFORE)[0], run_dir)
    return runs


RESHARDED = [
    (None, 0, {"pp_size": 2, "dp_size": 2}, 2),
    ({"dp_size": 2}, 3, {"tp_size": 4}, 0),
    ({"cp_size": 2, "pp_size": 2}, 1, {"cp_size": 2, "dp_size": 2}, 3),
    *exhaustive(
        ({"tp_size": 2, "pp_size": 2}, 1, {"dp_size": 2}, 1),
        (None, 0, {"tp_size": 2}, 1),
        ({"pp_size": 3}, 1, {"tp_size": 2, "pp_size": 2}, 1),
        ({"dp_size": 2}, 1, {"dp_size": 2}, 3),
    ),
]


@pytest.mark.parametrize(
    ("before", "stage_before", "after", "stage_after"), RESHARDED, ids=lambda value: str(value).replace("'", "")
)
@pytest.mark.parametrize("case", [LORA, FULL], ids=lambda case: case.method)
def test_another_topology_goes_on_with_the_same_training(
    case: Case,
    before: dict | None,
    stage_before: int,
    after: dict,
    stage_after: int,
    uninterrupted: dict[str, tuple[Trained, Path]],
    tmp_path: Path,
) -> None:
    """`before` None continues the checkpoint of the one process."""
    (expected_losses, expected), run_dir = uninterrupted[case.method]
    if before is not None:
        run_dir, first = tmp_path, replace(case, **before)
        run_distributed(train, first.world_size, first, stage_before, run_dir, 0, NUM_STEPS_BEFORE, NUM_STEPS_BEFORE)
    results = resume(replace(case, **after), stage_after, run_dir)
    seen = set()
    for losses, whole in results:
        assert losses == pytest.approx(expected_losses[NUM_STEPS_BEFORE:], abs=1e-6)
        for name, value in whole.items():
            source = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
            assert (value - expected[source]).abs().max() < 1e-6, name
            seen.add(source)
    assert seen == expected.keys()


def test_the_base_models_own_dropout_resumes_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toy, "MODEL", replace(toy.MODEL, hidden_dropout=0.3, attention_dropout=0.2))
    case = replace(LORA, tp_size=2)
    (expected, _), _ = run_distributed(train, 2, case, 1, tmp_path, 0, NUM_STEPS, NUM_STEPS_BEFORE)
    (losses, _), _ = resume(case, 1, tmp_path)
    assert losses == expected[NUM_STEPS_BEFORE:]
    monkeypatch.setattr(toy, "MODEL", replace(toy.MODEL, hidden_dropout=0.0, attention_dropout=0.0))
    (without, _), _ = run_distributed(train, 2, case, 1, tmp_path, 0, 1, None)
    assert without[0] != expected[0]


def test_every_topology_writes_the_same_tensors(tmp_path: Path) -> None:
    tensors = []
    for index, options in enumerate([{}, {"tp_size": 2, "pp_size": 2}, {"tp_size": 2, "dp_size": 2}]):
        case = replace(FULL, **options)
        run_distributed(train, case.world_size, case, 1, tmp_path / str(index), 0, 0, 0)
        directory = tmp_path / str(index) / "checkpoints" / "step-000000"
        files = sorted(directory.glob("stage-*.safetensors"))
        assert len(files) == case.pp_size
        tensors.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in tensors[0].items())


def save_where_the_disk_is_full(run_dir: Path) -> str:
    """Every file that a process writes may have 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        train(replace(LORA, pp_size=2), 1, run_dir, 1, 2, 2)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "saved"


def test_a_full_disk_leaves_the_old_generation(tmp_path: Path) -> None:
    run_distributed(train, 1, LORA, 1, tmp_path, 0, 1, 1)
    for message in run_distributed(save_where_the_disk_is_full, 2, tmp_path):
        target = tmp_path / "checkpoints" / "step-000002"
        for global_rank in (0, 1):
            assert f"global rank {global_rank}: {target} cannot be written: [Errno 27] File too large; raise" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert find_newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"


def load_other(run_dir: Path, case: Case, identity: dict) -> tuple[str, bool]:
    """The error, and whether anything was set before it."""
    gpt, trainable, topology = build_case(case)
    zero = build_zero_engine(
        gpt, trainable, zero=ZeroConfig(), optim=OPTIM, micro_batch_size=1, dtype=case.dtype, topology=topology
    )
    before = {one.name: zero.read_state(one) for one in trainable}
    path = find_newest_checkpoint(run_dir)
    assert path is not None
    try:
        load_checkpoint(path, engine=zero, trainable=trainable, topology=topology, identity=identity)
    except ValueError as error:
        after = {one.name: zero.read_state(one) for one in trainable}
        unchanged = all(
            torch.equal(after[n][key], tensor) for n, state in before.items() for key, tensor in state.items()
        )
        return str(error), unchanged
    return "loaded", False


def test_another_run_is_refused_and_nothing_is_set(tmp_path: Path) -> None:
    run_distributed(train, 1, LORA, 1, tmp_path, 0, 1, 1)
    other_rank = replace(LORA, lora=replace(LORA.lora, rank=2))
    changed = {**IDENTITY, "lora": {"layers.0.q_proj": {"lora_rank": 2}}}
    (message, unchanged), *_ = run_distributed(load_other, 1, tmp_path, other_rank, changed)
    assert "lora.layers.0.q_proj.lora_rank is 3 there and 2 in this run" in message
    assert unchanged
    (message, unchanged), *_ = run_distributed(load_other, 2, tmp_path, replace(other_rank, tp_size=2), IDENTITY)
    assert "layers.0.down_proj.lora_A has shape (3, 64), this run needs (2, 64)" in message
    assert unchanged
    fewer = replace(LORA, lora=replace(LORA.lora, target_modules=["q_proj"]))
    (message, unchanged), *_ = run_distributed(load_other, 1, tmp_path, fewer, IDENTITY)
    assert "layers.0.down_proj.lora_A has shape (3, 64), this run needs none" in message
    assert unchanged
