"""Recorded microbatches learn what microbatches run as written do: replayed operation by operation on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_runs import call, read_losses
from processes import run_distributed
from recording import CpuRecorder
from safetensors.torch import load_file
from tiers import exhaustive, few_of
from toy import MODEL, Case, build_batches, build_case, reduce_gradients

from lora_dist import run
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig
from lora_dist.mcore.graphs import MicrobatchGraphs
from lora_dist.mcore.schedule import forward_backward

pytestmark = pytest.mark.usefixtures("small_tiles")

NUM_STEPS = 3
TOY = replace(MODEL, num_layers=2)
LLAMA = replace(TOY, name="llama", family="llama", num_kv_heads=2)
GEMMA = replace(
    TOY, name="gemma", family="gemma3_text", num_kv_heads=2, sliding_window=8, full_attention_layers=[1],
    local_rope_theta=100.0,
)  # fmt: skip
OLMO = replace(TOY, name="olmo", family="olmo2", num_kv_heads=2)
ALL = LoraConfig(rank=3, target_modules=["all"])
DROPOUT = LoraConfig(rank=3, target_modules=["q_proj", "v_proj", "down_proj"], dropout=0.3)
CASES = {
    "lora": Case(model=TOY),
    "dropout": Case(model=TOY, lora=DROPOUT),
    "tp": Case(model=TOY, tp_size=2, lora=DROPOUT),
    "sp": Case(model=TOY, tp_size=2, sequence_parallel=True, lora=DROPOUT),
    "dp": Case(model=TOY, dp_size=2),
    "llama": Case(model=LLAMA, lora=ALL),
    "windows": Case(model=GEMMA, lora=ALL),
    "norms": Case(model=OLMO, tp_size=2, lora=replace(ALL, modules_to_save=["k_norm"])),
    "dora": Case(model=TOY, lora=replace(ALL, use_dora=True)),
    "full": Case(model=TOY, method="full", label_smoothing=0.1),
    **{
        name: Case(model=TOY, method=name)
        for name in ("bitfit", "adapter_h", "adapter_l", "prefix_embed", "prefix_layer")
    },
}
Trained = tuple[list[float], list[dict[str, torch.Tensor]], tuple[int, int]]


def train(case: Case, packed: bool, recorded: bool) -> Trained:
    """Losses and gradients of a few steps of plain gradient descent; how many recordings and replays."""
    gpt, trainable, topology = build_case(case)
    gpt.attends_in_blocks = False  # as graphs want it
    recorder = CpuRecorder()
    passes = MicrobatchGraphs(gpt, trainable, lambda: 1.0, recorder) if recorded else None
    losses, gradients = [], []
    for step in range(NUM_STEPS):
        batches = build_batches(topology, seed=step, packed=packed)
        loss, _ = forward_backward(gpt, batches, seed=0, step=step, scale_loss=None, passes=passes)
        losses.append(loss)
        gradients.append(reduce_gradients(trainable, topology))
        with torch.no_grad():
            for one in trainable:
                assert one.parameter.grad is not None
                one.parameter -= 0.05 * one.parameter.grad / topology.dp_size
                one.parameter.grad = None
    return losses, gradients, (recorder.num_records, recorder.num_replays)


RARELY = ("norms",)
PADDED = ("lora", "dropout", "windows", "prefix_layer")


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, name not in PADDED) for name in CASES if name not in RARELY),
        *exhaustive(*((name, True) for name in (*PADDED, *RARELY))),
    ],
    ids=str,
)
def test_a_replayed_step_has_the_gradients_of_the_step(name: str, packed: bool) -> None:
    case = CASES[name]
    written = run_distributed(train, case.world_size, case, packed, False)
    recorded = run_distributed(train, case.world_size, case, packed, True)
    for (losses, gradients, _), (their_losses, theirs, counts) in zip(written, recorded, strict=True):
        num_records, num_replays = counts
        assert 0 < num_records < num_replays, "shapes of microbatches come again"
        assert their_losses == pytest.approx(losses, rel=1e-12)
        for wanted, actual in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


RUN = [
    *("experiment=debug/tiny_lora", "loop.num_steps=4", "loop.micro_batch_size=2", "loop.global_batch_size=8"),
    *("optim.lr=1e-2", "loop.eval_every=2", "lora.dropout=0.2"),
]
RUNS = {
    "stage 0": ["topology=dp2", "zero.stage=0"],
    "stage 1": ["topology=tp2_sp"],
    "stage 2": ["topology=dp2", "zero.stage=2"],
    "offload": ["topology=dp2", "zero.offload_optimizer=true"],
    "fp16": ["topology=dp2", "dtype=fp16"],
    "full fp16": ["topology=dp2", "method=full", "dtype=fp16", "optim.lr=1e-3"],
    "full": ["topology=tp2", "method=full", "zero.stage=2", "optim.lr=1e-3"],
}


def train_run(words: list[str]) -> None:
    """As on a GPU, but for what records."""
    run.CudaRecorder = CpuRecorder
    run.check_cuda_graphs = lambda _: None
    run.train(compose_config(words))


@pytest.mark.parametrize("name", few_of(RUNS, "full fp16"))
def test_a_recorded_run_learns_the_same(name: str, tmp_path: Path) -> None:
    for directory, records in (("written", "false"), ("recorded", "true")):
        words = [*RUN, *RUNS[name], f"cuda_graphs={records}", f"run_dir={tmp_path / directory}"]
        run_distributed(train_run, 2, words)
    written, recorded = (tmp_path / directory for directory in ("written", "recorded"))
    for wanted, actual in zip(read_losses(written), read_losses(recorded), strict=True):
        assert actual == pytest.approx(wanted, rel=1e-2 if "fp16" in name else 1e-5)
    if "fp16" not in name:
        file = "model/model.safetensors" if "full" in name else "adapter/adapter_model.safetensors"
        ours, theirs = load_file(recorded / file), load_file(written / file)
        for key, wanted in theirs.items():
            torch.testing.assert_close(ours[key], wanted, rtol=1e-3, atol=1e-4)


def test_what_is_measured_of_a_recorded_run_is_the_same(tmp_path: Path) -> None:
    summaries = []
    for records in ("false", "true"):
        run_dir = tmp_path / records
        words = [*RUN, "topology=tp2", "packed_attention=mask", f"cuda_graphs={records}", f"run_dir={run_dir}"]
        run_distributed(train_run, 2, words)
        summaries.append(json.loads((run_dir / "summary.json").read_text()))
    written, recorded = summaries
    assert written["flops_per_step"] > 0
    for key in ("flops_per_step", "collectives", "step_ledger", "optimizer_state_bytes"):
        assert recorded[key] == written[key]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topology=pp2"], "cuda_graphs=true needs topology.pp_size=1, got 2"),
        (["zero.stage=3"], "cuda_graphs=true needs zero.stage<=2, got 3"),
        (["loop.recompute=selective"], "cuda_graphs=true needs loop.recompute=none, got selective"),
        (
            ["model.hidden_dropout=0.1"],
            "cuda_graphs=true needs model.hidden_dropout=0, got 0.1; lora.dropout may be used",
        ),
    ],
)
def test_what_does_not_repeat_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        compose_config(["model=tiny", "data=fake", *words, "cuda_graphs=true"])


def test_a_cpu_records_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refusal = "cuda_graphs=true needs a GPU, and this run is on the cpu; leave it out"
    words = ["experiment=debug/tiny_lora", "topology=single", "device=cpu", f"run_dir={tmp_path / 'run'}"]
    for verb, *asked in (["train", "cuda_graphs=true"], ["bench", "bench.contenders=[lora,lora_graphs]"]):
        assert run_distributed(call, 1, [verb, *words, *asked]) == [2]
        assert refusal in capfd.readouterr().err
