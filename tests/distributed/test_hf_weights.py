"""Hugging Face weights in shards: the same logits as transformers, round trips bit for bit, one tensor at a time."""

import json
from pathlib import Path

import pytest
import torch
from hf_toy import (
    build_hf_model,
    build_shard,
    compute_hf_logits,
    compute_logits,
    count_processes,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_distributed
from safetensors.torch import load_file
from toy import MODEL, Case, build_batches, build_case, gather_whole

from lora_dist.config import OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.files import hf_reader
from lora_dist.files.base_values import to_stored
from lora_dist.mcore.base_parameters import describe_base_parameters
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.zero.engine import build_zero_engine

TOPOLOGIES = [
    {},
    {"tp_size": 2},
    {"tp_size": 4},
    {"pp_size": 2},
    {"pp_size": 4},
    {"tp_size": 2, "pp_size": 2},
    {"tp_size": 2, "sequence_parallel": True},
    {"tp_size": 2, "pp_size": 2, "sequence_parallel": True},
    {"tp_size": 2, "dp_size": 2},
]
FILES = [
    {},
    {"max_shard_size": "40KB"},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "max_shard_size": "40KB"},
]


def load_and_compute(options: dict, directory: Path) -> torch.Tensor | None:
    gpt = build_shard(options, read_toy_config(directory))
    load_hf_checkpoint(gpt, directory)
    return compute_logits(gpt)


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
def test_logits_equal_transformers(options: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    expected = compute_hf_logits(tmp_path)
    results = run_distributed(load_and_compute, count_processes(options), options, tmp_path)
    logits = [result for result in results if result is not None]
    assert logits
    assert expected.abs().max() > 1
    for actual in logits:
        assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("files", FILES, ids=str)
def test_every_kind_of_file_loads(files: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, **files)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in files)
    expected = compute_hf_logits(tmp_path)
    for result in run_distributed(load_and_compute, 2, {"tp_size": 2}, tmp_path):
        assert (result - expected).abs().max() < 1e-4


def round_trip(options: dict, source: Path, target: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    model = read_toy_config(source)
    gpt = build_shard(options, model, dtype)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=max_shard_bytes)


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
def test_round_trip_is_bit_equal(options: dict, tmp_path: Path) -> None:
    dtype = torch.float16 if options.get("pp_size") == 2 else torch.float32
    source, target = tmp_path / "source", tmp_path / "target"
    write_toy_checkpoint(source, dtype=dtype)
    (source / "vocab.json").write_text("{}")
    run_distributed(round_trip, count_processes(options), options, source, target, dtype, 50_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in target.glob("*.safetensors")}
    assert len(files) > 1
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    written = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    expected = load_file(source / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert (target / "vocab.json").read_text() == "{}"
    assert json.loads((target / "config.json").read_text())["bos_token_id"] == 100
    assert torch.equal(compute_hf_logits(source), compute_hf_logits(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def fine_tune_and_write(stage: int, target: Path) -> dict[str, torch.Tensor]:
    """One step of full fine-tuning at TP 2 x DP 2, written from ZeRO's masters; the whole values it must have."""
    gpt, trainable, topology = build_case(Case(method="full", tp_size=2, dp_size=2, dtype=torch.float32))
    optim = OptimConfig(lr=1e-2)
    zero = build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=stage),
        optim=optim,
        micro_batch_size=1,
        dtype=torch.float32,
        topology=topology,
    )
    Engine(gpt, zero, trainable, topology, seed=0).train_step(build_batches(topology), step=0, lr=optim.lr)
    write_hf_checkpoint(gpt, target, model=MODEL, read=zero.read_value)
    return {one.name: gather_whole(zero.read_value(one)["value"], one, topology) for one in trainable}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_fine_tuned_model_is_written_from_under_zero(stage: int, tmp_path: Path) -> None:
    values = run_distributed(fine_tune_and_write, 4, stage, tmp_path / "model")[0]
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert len(written) == len(values)
    for name, value in to_stored(values, values, MODEL).items():
        assert torch.equal(written[f"transformer.{name}"], value), name
    assert compute_hf_logits(tmp_path / "model").isfinite().all()


def write_where_the_disk_is_full(source: Path, target: Path) -> str:
    gpt = build_shard({"tp_size": 2}, read_toy_config(source))
    load_hf_checkpoint(gpt, source)
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        write_hf_checkpoint(gpt, target, model=read_toy_config(source))
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "written"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_toy_checkpoint(source)
    target.mkdir()
    (target / "old").write_text("kept")
    for message in run_distributed(write_where_the_disk_is_full, 2, source, target):
        assert message.startswith(
            f"global rank 0: {target} cannot be written: [Errno 27] File too large; raise the limit"
        )
    assert [path.name for path in target.iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def measure_reading(options: dict, directory: Path) -> tuple[int, int, int]:
    """Most bytes read from the files that were alive at once; all bytes read; bytes of the shard."""
    import weakref

    live, most, total = 0, 0, 0
    real = hf_reader.read_part

    def release(num_bytes: int) -> None:
        nonlocal live
        live -= num_bytes

    def counted(*args: object, **options: object) -> torch.Tensor:
        nonlocal live, most, total
        part = real(*args, **options)  # type: ignore[arg-type]
        live += part.nbytes
        most, total = max(most, live), total + part.nbytes
        weakref.finalize(part, release, part.nbytes)
        return part

    hf_reader.read_part = counted
    gpt = build_shard(options, read_toy_config(directory))
    load_hf_checkpoint(gpt, directory)
    hf_reader.read_part = real
    return most, total, sum(one.parameter.nbytes for one in describe_base_parameters(gpt))


@pytest.mark.parametrize("options", [{"tp_size": 4}, {"tp_size": 2, "pp_size": 2}], ids=str)
def test_no_process_reads_more_than_its_shard_nor_holds_more_than_one_tensor(options: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    largest = max(parameter.nbytes for parameter in build_hf_model().parameters())
    for most, total, shard in run_distributed(measure_reading, 4, options, tmp_path):
        assert 0 < most <= largest
        assert total <= shard
