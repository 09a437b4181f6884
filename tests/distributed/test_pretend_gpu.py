"""What runs on GPUs and nowhere else, run on pretend ones (tests/pretend_gpu), each case against the same on CPUs.

Their kernels' interfaces, DeepSpeed's and Megatron's ways for CUDA, NCCL's, graphs, memory.
"""

import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
from demo_runs import ASSETS, DEMO, call
from pretend_gpu import PretendGpus, find_obstacle, kernels, run_pretending
from processes import run_distributed
from safetensors.torch import load_file
from test_devices import ADAPTED, RESUMED, TINY, count_processes
from test_encoder_runs import describe_command
from test_gpu_parity import CASES, train
from tiers import few_of

from lora_dist.cli.compose import compose_config
from lora_dist.config import RunConfig
from lora_dist.plan.execute import build_batches
from lora_dist.plan.job import execute_all
from lora_dist.run import build_engine, open_job

V100, H100 = (7, 0), (9, 0)


@pytest.fixture(scope="module")
def gpus() -> Iterator[PretendGpus]:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    pretended = PretendGpus()
    yield pretended
    pretended.close()


def train_and_count(name: str, device: str, directory: str) -> tuple[list[float], dict[str, int]]:
    return train(name, device, Path(directory)), dict(kernels.CALLS)


@pytest.mark.parametrize("name", few_of({name: None for name in CASES if "compiled" not in name}, "lora-graphs"))
def test_one_gpu_trains_as_a_cpu_does(gpus: PretendGpus, name: str, tmp_path: Path) -> None:
    ((actual, calls),) = gpus.run(train_and_count, 1, name, "cuda", str(tmp_path))
    ((expected, _),) = run_distributed(train_and_count, 1, name, "cpu", str(tmp_path))
    tolerance = CASES[name][1]
    assert actual == pytest.approx(expected, rel=tolerance)
    if tolerance <= 1e-5:
        on_cpu, on_gpu = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
        for key, value in on_cpu.items():
            torch.testing.assert_close(on_gpu[key], value, rtol=1e-3, atol=1e-4)
    assert calls, "attention by the device's own kernels"
    assert "plain products" not in calls


def run_verbs(*commands: list[str]) -> list[int]:
    return [call(words) for words in commands]


def read_losses(run: Path) -> list[float]:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [step[key] for step in steps for key in ("loss", "valid_loss") if key in step]


RUNS = ADAPTED | {
    "parts of rows": ["topology=cp2", "model.family=llama", "model.num_kv_heads=2", "data.seq_len=32"],
    "windows": [
        *("topology=single", "model.family=mistral", "model.num_kv_heads=2", "model.sliding_window=5"),
        "data.seq_len=32",
    ],
}


@pytest.mark.parametrize("name", few_of(RUNS, "stages", "offload", "parts of rows", "windows"))
def test_a_run_on_v100s_is_that_on_cpus(gpus: PretendGpus, name: str, tmp_path: Path) -> None:
    """From reading to writing, and continued. Without what the base drops, which each device draws its own way."""
    losses, own = {}, [word for word in RUNS[name] if not re.match(r"model\.\w+_dropout=", word)]
    for device in ("cpu", "cuda"):
        words = [*TINY, *own, "optim.lr=1e-2", f"device={device}", f"run_dir={tmp_path / device}"]
        commands = [[*words, "loop.num_steps=2"]]
        if name in RESUMED:
            commands += [[*words, "loop.num_steps=3", "resume=must"]]
        if device == "cpu":
            codes = run_distributed(run_verbs, count_processes(words), *commands)
        else:
            capability = H100 if "dtype=bf16" in words else V100
            codes = gpus.run(run_verbs, count_processes(words), *commands, capability=capability)
        assert codes == [[0] * len(commands)] * count_processes(words)
        losses[device] = read_losses(tmp_path / device)
    is_half = any(word in own for word in ("dtype=fp16", "dtype=bf16"))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3 if is_half else 1e-5)


def write_questions(directory: Path, adapter: Path) -> None:
    rows = {"alone": [{"context": f"name : {name}"} for name in "ABC"]}
    rows["mixed"] = [{"context": "name : A", "adapter": given} for given in (str(adapter), None, str(adapter))]
    for name, questions in rows.items():
        (directory / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, questions)))
    references = (ASSETS / "e2e_sample" / "test.txt").read_text().splitlines()[:4]
    (directory / "references.txt").write_text("\n".join(references))


def list_verbs(directory: Path, adapter: Path, output: Path) -> list[list[str]]:
    one, fp32 = f"adapter={adapter}", "dtype=fp32"
    alone = [fp32, "generate.max_new_tokens=6", f"generate.input={directory / 'alone.jsonl'}"]
    mixed = [fp32, "generate.max_new_tokens=6", f"generate.input={directory / 'mixed.jsonl'}"]
    return [
        ["generate", one, *alone, f"generate.output={output / 'greedy'}"],
        ["generate", one, *alone, f"generate.output={output / 'beams'}", "generate.num_beams=3"],
        ["generate", one, *alone, f"generate.output={output / 'merged'}", "generate.merge=true"],
        ["generate", one, *alone, f"generate.output={output / 'nf4'}", "model.base_format=nf4"],
        ["generate", f"adapters=[{adapter}]", *mixed, f"generate.output={output / 'mixed'}"],
        [
            "evaluate",
            one,
            fp32,
            "task=e2e",
            f"task.references={directory / 'references.txt'}",
            f"texts={output / 'texts'}",
        ],
        ["merge", one, f"output={output / 'whole'}"],
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize("topology", ["single", "tp2"])
def test_what_is_made_of_adapters_is_what_cpus_make(gpus: PretendGpus, topology: str, tmp_path: Path) -> None:
    place, run = [f"topology={topology}"], tmp_path / "run"
    world_size = count_processes(place)
    train_words = ["train", *DEMO, *place, f"run_dir={run}", "device=cpu"]
    assert run_distributed(call, world_size, train_words) == [0] * world_size
    write_questions(tmp_path, run / "adapter")
    for device, run_on in (("cpu", run_distributed), ("cuda", gpus.run)):
        verbs = list_verbs(tmp_path, run / "adapter", tmp_path / device)
        commands = [[*words, *place, f"device={device}"] for words in verbs]
        assert run_on(run_verbs, world_size, *commands) == [[0] * len(commands)] * world_size
    for name in ("greedy", "beams", "merged", "nf4", "mixed", "texts"):
        assert (tmp_path / "cuda" / name).read_text() == (tmp_path / "cpu" / name).read_text()
    whole = [load_file(tmp_path / device / "whole" / "model.safetensors") for device in ("cuda", "cpu")]
    torch.testing.assert_close(*whole)


FULL = {
    "train": (2**23, ["train", *DEMO, "topology=tp2", "loop.micro_batch_size=4"]),
    "full": (
        2**23,
        ["train", *DEMO, "topology=dp2", "method=full", "loop.recompute=full", "loop.micro_batch_size=1"],
    ),
    "generate": (2**22, ["generate", "topology=tp2", "generate.prompt=name : A"]),
}
"""Bytes that are no more than such a job begins with, and the job."""
REMEDIES = {
    "train": "loop.micro_batch_size=2 (is 4), loop.recompute=full (is none), model.base_format=nf4, or a larger",
    "full": "zero.offload_optimizer=true, or a higher zero.stage over more replicas, or a larger topology.tp_size",
    "generate": "a larger topology.tp_size or pp_size, or for generate and evaluate fewer rows at once",
}


def run_with_little_memory(words: list[str], num_bytes: int) -> tuple[int, str]:
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.mem_get_info()[1])
    with redirect_stderr(StringIO()) as told:
        return call(words), told.getvalue()


@pytest.mark.parametrize("name", few_of(FULL, "train"))
def test_memory_that_is_full_is_told_with_what_takes_less(gpus: PretendGpus, name: str, tmp_path: Path) -> None:
    num_bytes, words = FULL[name]
    words = [*words, "device=cuda", *([] if name == "generate" else [f"run_dir={tmp_path / 'run'}"])]
    for code, told in gpus.run(run_with_little_memory, 2, words, num_bytes):
        assert code == 2
        assert re.search(
            r"error: pretended \d \(80.0 GiB\) is out of memory: [\d.]+ MiB more were wanted, tensors", told
        )
        assert f". Less is held with {REMEDIES[name]}" in told


@pytest.mark.exhaustive
def test_memory_that_is_full_of_an_encoder(gpus: PretendGpus, tmp_path: Path) -> None:
    words = describe_command(tmp_path, "run", f"train={tmp_path / 'train.tsv'}", "topology=dp2", "device=cuda")
    for code, told in gpus.run(run_with_little_memory, 2, words, 2**14):
        assert code == 2
        assert " is out of memory: " in told
        assert ", or a shorter encoder.seq_len" in told


def test_one_process_that_fails_says_so_and_ends_all(gpus: PretendGpus, tmp_path: Path) -> None:
    """The others wait for it in a collective, and NCCL's groups are taken down by all together or not at all."""
    words = ["train", *DEMO, "topology=tp2", "device=cuda", f"run_dir={tmp_path / 'run'}"]
    done = run_pretending("-m", "lora_dist.cli.main", *words, timeout_s=240, PRETEND_FULL="1")
    assert done.returncode == 2, done.stderr
    assert "pretended 1 (80.0 GiB) is out of memory" in done.stderr


PLANNED = {
    "lora": [],
    "recompute": ["loop.recompute=full"],
    "padded": ["data.collate=pad"],
    "masked": ["packed_attention=mask"],
    "full": ["method=full"],
    "v100": ["dtype=fp16"],
    "llama": ["model.family=llama", "model.num_kv_heads=4"],
    "experts": [
        *("model.family=mixtral", "model.num_experts=4", "model.experts_per_token=2", "model.tied_output=false"),
        "lora.target_modules=[all,gate_proj,up_proj,down_proj]",
    ],
    "sinks": [
        *("model.family=gpt_oss", "model.num_experts=4", "model.experts_per_token=2", "model.swiglu_alpha=1.7"),
        *("model.swiglu_limit=7", "model.sliding_window=64", "model.tied_output=false", "lora.target_modules=[all]"),
    ],
}


def build_planned(name: str) -> RunConfig:
    return compose_config(
        [
            *("model=tiny", "model.hidden_size=256", "model.ffn_hidden_size=1024", "model.vocab_size=2048"),
            *("data=fake", "data.seq_len=128", "track=none", "device=cuda", "dtype=bf16"),
            *("loop.micro_batch_size=2", "loop.global_batch_size=4"),
            *(f"hardware={'v100_32gb' if name == 'v100' else 'h100'}", *PLANNED[name]),
        ]
    )


def measure(name: str) -> int:
    """Peak allocated bytes of the second step."""
    config = build_planned(name)
    with open_job(config) as topology:
        engine, _ = build_engine(config, topology)
        batches = build_batches(config, topology, config.loop.global_batch_size // config.loop.micro_batch_size)
        engine.train_step(batches, step=0, lr=1e-4)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(batches, step=1, lr=1e-4)
        return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("name", few_of(PLANNED, "lora"))
def test_planned_memory_is_what_the_device_holds(gpus: PretendGpus, name: str) -> None:
    (measured,) = gpus.run(measure, 1, name, capability=V100 if name == "v100" else H100)
    (planned,) = execute_all([(build_planned(name), 1, 0)], 1)
    assert planned.peak_bytes == pytest.approx(measured, rel=0.03)
