"""The paper's other baselines: gradients and training of every topology against one process, files, what is refused."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import test_zero
import torch
import torch.distributed as dist
from data_files import VOCAB_SIZE, tiny_tokenizer, tokenizer_directory
from processes import run_distributed
from safetensors.torch import load_file, save_file
from test_measure_collectives import count_by_kind, count_step
from test_parity import TOLERANCE, compute_error, compute_unsummed_gradients, run_case
from tiers import exhaustive
from toy import Case
from transformers import GPT2LMHeadModel

from lora_dist.checkpoint.identity import describe_method
from lora_dist.checkpoint.listing import list_adapters
from lora_dist.checkpoint.method_store import load_method, open_method
from lora_dist.cli.compose import compose_config
from lora_dist.cli.main import main
from lora_dist.config import RunConfig, ZeroConfig
from lora_dist.data.loader import build_loaders
from lora_dist.files.directories import compute_sha256, read_json, write_manifest
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.hf_weights import fill_base
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.schedule import evaluate_loss
from lora_dist.measure.metrics_file import read_metrics
from lora_dist.methods import apply_method
from lora_dist.methods.count import count_trainable
from lora_dist.plan.job import list_variants
from lora_dist.run import train

METHODS = ["bitfit", "adapter_h", "adapter_l"]
TOPOLOGIES = [
    {"tp_size": 2},
    {"tp_size": 4, "sequence_parallel": True},
    {"pp_size": 2},
    *exhaustive({"tp_size": 2, "dp_size": 2}, {"recompute": "full"}),
    {"recompute": "selective"},
    {"tp_size": 2, "pp_size": 2, "recompute": "full", "sequence_parallel": True},
]


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def gradients(method: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one process."""
    return run_case(Case(method=method))


@pytest.mark.parametrize("options", TOPOLOGIES, ids=lambda options: str(Case(**options)))
def test_gradients_equal_one_process(
    method: str, gradients: tuple[float, dict[str, torch.Tensor]], options: dict
) -> None:
    expected_loss, expected = gradients
    loss, actual = run_case(Case(method=method, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


TRAINED = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def trained(method: str) -> Iterator[test_zero.Trained]:
    """By plain torch in one process, clipped like everything that runs while this fixture lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_zero, "OPTIM", replace(test_zero.OPTIM, clip_grad_norm=0.05))  # gradients are small
        yield run_distributed(test_zero.train_oracle, 1, Case(method=method, **TRAINED))[0]


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({"dp_size": 2}, 1),
        ({"tp_size": 2, "dp_size": 2, "sequence_parallel": True}, 2),
        ({"tp_size": 2, "pp_size": 2}, 1),
        ({"dp_size": 2}, 3),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_trains_like_plain_torch(method: str, options: dict, stage: int, trained: test_zero.Trained) -> None:
    case = Case(method=method, **TRAINED, **options)
    results = run_distributed(test_zero.train, case.world_size, case, ZeroConfig(stage=stage))
    test_zero.assert_trained_alike(results, trained)


MODEL = ["model=tiny", f"model.vocab_size={VOCAB_SIZE}"]
RUN = [
    *("experiment=debug/tiny_lora", *MODEL, "optim.lr=1e-2", "loop.num_steps=4", "loop.save_every=2"),
    *("loop.micro_batch_size=2", "loop.global_batch_size=4"),
]


def run_training(overrides: list[str]) -> None:
    train(compose_config(overrides))


@pytest.fixture(scope="module")
def run_dir(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four steps on two tensor-parallel processes."""
    directory = tmp_path_factory.mktemp(method) / "run"
    run_distributed(run_training, 2, [*RUN, f"method={method}", f"run_dir={directory}"])
    return directory


def read_losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def test_a_run_leaves_whole_tensors_and_a_report(method: str, run_dir: Path) -> None:
    config = compose_config([*RUN, f"method={method}"])
    files = {path.name for path in (run_dir / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "manifest.json"}
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert sum(tensor.numel() for tensor in tensors.values()) == count_trainable(config)
    assert summary["num_trainable_parameters"] == count_trainable(config)
    assert summary["optimizer_state_bytes_per_process"] - summary["optimizer_padding_bytes_per_process"] > 0
    assert summary["step_ledger"]["gradient_bytes"] > 0
    assert json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["method"] == method
    (row,) = list_adapters(run_dir)
    assert (row.targets, row.state) == (method, "whole")
    assert summary["valid_loss_after"] != summary["valid_loss_before"]


def build_loaded(config: RunConfig, directory: Path) -> ShardedGpt:
    """The base with what `directory` holds."""
    topology = build_topology(config.topology, device=torch.device("cpu"), local_rank=dist.get_rank(), seed=0)
    gpt = build_model(config.model, topology, dtype=torch.float32, clock=DropoutClock())
    fill_base(gpt, config.model, seed=config.loop.seed)
    applied = apply_method(gpt, config)
    fingerprint = compute_base_fingerprint(config.model, config.loop.seed)
    stored = open_method(directory, model=config.model, base_fingerprint=fingerprint)
    load_method(stored, options=describe_method(config), trainable=applied.trainable, topology=topology)
    return gpt


def evaluate_loaded(config: RunConfig, directory: Path) -> float:
    """Its validation loss."""
    gpt = build_loaded(config, directory)
    topology = gpt.topology
    valid = build_loaders(config, dp_size=topology.dp_size, dp_rank=topology.dp_rank).valid
    assert valid is not None
    batches = list(valid.validation_batches())
    return sum(evaluate_loss(gpt, b) for b in batches) / sum(b[0].num_loss_tokens for b in batches)


@pytest.mark.parametrize("topology", ["single", "tp2_sp", "pp2"])
def test_the_files_load_at_any_topology(method: str, topology: str, run_dir: Path) -> None:
    config = compose_config([*RUN, f"method={method}", f"topology={topology}"])
    world_size = config.topology.tp_size * config.topology.pp_size
    expected = json.loads((run_dir / "summary.json").read_text())["valid_loss_after"]
    for loss in run_distributed(evaluate_loaded, world_size, config, run_dir / "adapter"):
        assert loss == pytest.approx(expected, abs=1e-6)


def test_a_run_resumes_at_another_topology(method: str, run_dir: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run_dir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    shutil.rmtree(resumed / "adapter")
    more = [f"method={method}", f"run_dir={resumed}", "resume=must", "topology=dp2", "zero=stage2"]
    run_distributed(run_training, 2, [*RUN, *more])
    assert read_losses(resumed) == pytest.approx(read_losses(run_dir), abs=1e-5)
    name = "adapter/adapter_model.safetensors"
    expected = load_file(run_dir / name)
    for key, tensor in load_file(resumed / name).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0)


def call(words: list[str]) -> int:
    """`lora-dist WORDS` as one process of a job that a launcher started."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


def test_biases_are_merged_and_bottlenecks_refused(
    method: str, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", *MODEL, f"adapter={run_dir / 'adapter'}", f"output={tmp_path / 'merged'}", "topology=tp2"]
    exit_codes = run_distributed(call, 2, words)
    if method != "bitfit":
        assert exit_codes == [2, 2]
        assert f"is of method={method}: bottlenecks cannot be merged" in capfd.readouterr().err
        assert not (tmp_path / "merged").exists()
        words = ["generate", *MODEL, f"model.tokenizer={tokenizer_directory()}", "generate.prompt=a"]
        assert run_distributed(call, 1, [*words, f"adapter={run_dir}", "generate.merge=true"]) == [2]
        assert "bottlenecks cannot be merged" in capfd.readouterr().err
        return
    assert exit_codes == [0, 0]
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    trained = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for key, tensor in trained.items():
        assert torch.equal(merged[key.removeprefix("base_model.model.")], tensor)
    assert {key for key in merged if key.endswith(".bias")} == {k.removeprefix("base_model.model.") for k in trained}


def test_export_is_refused(method: str, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["export", *MODEL, f"adapter={run_dir / 'adapter'}", f"output={tmp_path / 'x'}", "format=peft"]
    assert run_distributed(call, 1, words) == [2]
    assert f"is of method={method}" in capfd.readouterr().err


PROMPT = "name : The Vaults"


def generate_greedily(config: RunConfig, directory: Path) -> str:
    """Each token from a whole forward pass of the model as it was trained: nothing kept, no mask."""
    gpt, tokenizer = build_loaded(config, directory).eval(), tiny_tokenizer()
    tokens = [*tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id]
    num_given = len(tokens)
    for _ in range(6):
        with torch.no_grad():
            logits = gpt(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
        assert not logits.requires_grad, "evaluation keeps no graph"
        tokens.append(int(logits[0, -1, : config.model.vocab_size].argmax()))
    generated = [*tokens[num_given:], tokenizer.eos_token_id]
    text: str = tokenizer.decode(generated[: generated.index(tokenizer.eos_token_id)]).strip()
    return text


def test_generation_is_what_was_trained(method: str, run_dir: Path, tmp_path: Path) -> None:
    config = compose_config([*RUN, f"method={method}", "topology=single"])
    (expected,) = run_distributed(generate_greedily, 1, config, run_dir / "adapter")
    assert expected
    words = ["generate", *MODEL, f"model.tokenizer={tokenizer_directory()}", f"generate.prompt={PROMPT!r}"]
    merge = f"generate.merge={str(method == 'bitfit').lower()}"
    for topology, world_size in (("single", 1), ("tp2_pp2", 4)):
        output = tmp_path / f"{topology}.jsonl"
        more = [f"adapter={run_dir}", f"topology={topology}", f"generate.output={output}", merge]
        assert run_distributed(call, world_size, [*words, "generate.max_new_tokens=6", *more]) == [0] * world_size
        assert json.loads(output.read_text())["text"] == expected


def open_again(directory: Path, seed: int = 0) -> None:
    model = compose_config(RUN).model
    open_method(directory, model=model, base_fingerprint=compute_base_fingerprint(model, seed))


def test_what_does_not_fit_is_refused_by_name(method: str, run_dir: Path, tmp_path: Path) -> None:
    open_again(run_dir / "adapter")
    with pytest.raises(ValueError, match="base_fingerprint is 'seed:0:"):
        open_again(run_dir / "adapter", seed=1)
    copy = tmp_path / "adapter"
    shutil.copytree(run_dir / "adapter", copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    missing = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        open_again(copy)
    manifest = read_json(copy / "manifest.json")
    hashes = {name: compute_sha256(copy / name) for name in manifest.pop("sha256")}
    write_manifest(copy, hashes, manifest)
    with pytest.raises(ValueError, match=f"{re.escape(missing)} has shape none, the model needs"):
        open_again(copy)
    write_manifest(copy, hashes, {**manifest, "method": "adapter_h", "bottleneck": {"size": "many"}})
    with pytest.raises(ValueError, match="not a size and an activation"):
        open_again(copy)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_no_collective_is_added(method: str, sequence_parallel: bool) -> None:
    options = {"tp_size": 2, "sequence_parallel": sequence_parallel}
    base, _ = run_distributed(count_step, 2, Case(**options), [], True)[0]
    ours, after = run_distributed(count_step, 2, Case(method=method, **options), ["q_proj"], True)[0]
    assert count_by_kind(ours) == count_by_kind(base)
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)] * sequence_parallel


def test_an_unsummed_partial_gradient_is_seen(method: str, gradients: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Without the one sum a step that sequence parallelism needs, the oracle comparison must fail."""
    case = Case(method=method, tp_size=2, sequence_parallel=True)
    results = run_distributed(compute_unsummed_gradients, 2, case)
    assert compute_error(results[0][1], gradients[1]) > 1e-2


def test_the_plan_is_of_the_method(method: str) -> None:
    variants = list_variants(compose_config([f"method={method}", "plan.recompute=[none]"]))
    assert [variant.method for variant in variants] == [method, "lora", "full"]
