"""Prefix methods as a user runs them: files at any topology, resuming, generation, evaluation, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from data_files import tiny_tokenizer, tokenizer_directory
from processes import run_distributed
from safetensors.torch import load_file
from test_baselines import MODEL, build_loaded, call, evaluate_loaded, open_again, read_losses, run_training
from test_baselines import RUN as SHORT_RUN

from lora_dist.checkpoint.listing import list_adapters
from lora_dist.cli.compose import compose_config
from lora_dist.config import RunConfig
from lora_dist.files.directories import read_json, write_manifest
from lora_dist.mcore.model import ShardedGpt
from lora_dist.methods.count import count_trainable
from lora_dist.plan.job import list_variants

METHODS = ["prefix_layer", "lora_prefix_embed"]
RUN = [*SHORT_RUN, "prefix.num_prefix=3", "prefix.num_infix=2", "prefix.init_std=0.3", "optim.lr=3e-2"]
PROMPT = "name : The Vaults"


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run_dir(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four steps on two tensor-parallel processes that split the sequence."""
    directory = tmp_path_factory.mktemp(method) / "run"
    run_distributed(run_training, 2, [*RUN, f"method={method}", "topology=tp2_sp", f"run_dir={directory}"])
    return directory


def test_a_run_leaves_whole_tensors_and_a_report(method: str, run_dir: Path) -> None:
    config = compose_config([*RUN, f"method={method}"])
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert tensors["embedding.prefix"].shape == (5, 64)
    assert ("layers.1.prefix" in tensors) == (method == "prefix_layer")
    assert ("layers.1.v_proj.lora_B" in tensors) == (method == "lora_prefix_embed")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert sum(tensor.numel() for tensor in tensors.values()) == count_trainable(config)
    assert summary["num_trainable_parameters"] == count_trainable(config)
    assert "3 positions before the context and 2 before the target" in summary["setup"]["adapters"]
    (row,) = list_adapters(run_dir)
    targets, lora_rank = {"prefix_layer": ("prefix_layer", ""), "lora_prefix_embed": ("lora_prefix_embed q,v", "4")}[
        method
    ]
    assert (row.targets, row.rank, row.state) == (targets, lora_rank, "whole")
    assert summary["valid_loss_after"] != summary["valid_loss_before"]


@pytest.mark.parametrize("topology", ["single", "pp2"])
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
    with pytest.raises(AssertionError, match=r"prefix\.num_infix is 2 there and 1 in this run"):
        run_distributed(run_training, 2, [*RUN, *more, "prefix.num_infix=1"])
    run_distributed(run_training, 2, [*RUN, *more])
    assert read_losses(resumed) == pytest.approx(read_losses(run_dir), abs=1e-5)
    name = "adapter/adapter_model.safetensors"
    expected = load_file(run_dir / name)
    for key, tensor in load_file(resumed / name).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0)


def compute_next_logits(gpt: ShardedGpt, tokens: list[int], slots: list[int]) -> torch.Tensor:
    """[V]; a whole forward pass: nothing kept, no mask."""
    gpt.slots_BS = torch.tensor([slots])
    with torch.no_grad():
        return gpt(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1]


def generate_greedily(config: RunConfig, directory: Path) -> str:
    """The prompt as in training, slot for slot."""
    gpt, tokenizer = build_loaded(config, directory).eval(), tiny_tokenizer()
    context, end = tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id
    tokens, slots = [0, 0, 0, *context, end, 0, 0], [1, 2, 3, *[0] * len(context), 0, 4, 5]
    num_given = len(tokens)
    for _ in range(6):
        logits = compute_next_logits(gpt, tokens, slots)
        tokens.append(int(logits[: config.model.vocab_size].argmax()))
        slots.append(0)
    generated = [*tokens[num_given:], end]
    text: str = tokenizer.decode(generated[: generated.index(end)]).strip()
    return text


def generate(run_dir: Path, output: Path, *words: str, world_size: int = 1) -> list[str]:
    command = ["generate", *MODEL, f"model.tokenizer={tokenizer_directory()}", f"adapter={run_dir}"]
    command += [f"generate.output={output}", "generate.max_new_tokens=6", *words]
    assert run_distributed(call, world_size, command) == [0] * world_size
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


def test_generation_is_what_was_trained(method: str, run_dir: Path, tmp_path: Path) -> None:
    config = compose_config([*RUN, f"method={method}", "topology=single"])
    (expected,) = run_distributed(generate_greedily, 1, config, run_dir / "adapter")
    assert expected
    prompt = f"generate.prompt={PROMPT!r}"
    assert generate(run_dir, tmp_path / "1", prompt) == [expected]
    assert generate(run_dir, tmp_path / "4", prompt, "topology=tp2_pp2", world_size=4) == [expected]


CONTEXTS = ["name : The Vaults", "a", "name : The Mill , food : English , area : city centre"]


def test_a_run_is_evaluated_as_it_generates(method: str, run_dir: Path, tmp_path: Path) -> None:
    """Beams, no n-gram twice, contexts of different lengths in one batch, another topology: the same texts."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"context": one, "target": "a pub"}) for one in CONTEXTS))
    decoding = ["generate.num_beams=3", "generate.no_repeat_ngram_size=2"]
    expected = generate(run_dir, tmp_path / "out", f"generate.input={pairs}", *decoding, "generate.batch_size=1")
    words = ["evaluate", *MODEL, f"model.tokenizer={tokenizer_directory()}", f"adapter={run_dir}", "task=jsonl"]
    words += [f"task.references={pairs}", f"texts={tmp_path / 'texts'}", "topology=tp2", *decoding]
    assert run_distributed(call, 2, [*words, "generate.max_new_tokens=6"]) == [0, 0]
    assert [json.loads(line)["text"] for line in (tmp_path / "texts").read_text().splitlines()] == expected
    assert len(set(expected)) > 1


def test_what_takes_positions_is_no_weight(
    method: str, run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, output = f"adapter={run_dir / 'adapter'}", f"output={tmp_path / 'x'}"
    for words in (
        ["merge", *MODEL, adapter, output],
        ["export", *MODEL, adapter, output, "format=hf_merged"],
        ["switch", *MODEL, f"adapters=[{run_dir / 'adapter'},{run_dir / 'adapter'}]"],
        ["generate", *MODEL, f"model.tokenizer={tokenizer_directory()}", adapter, "generate.prompt=a"],
    ):
        more = ["generate.merge=true"] if words[0] == "generate" else []
        assert run_distributed(call, 1, [*words, *more]) == [2]
        message = f"is of method={method}: prefix vectors cannot be merged, exported or mixed in one batch"
        assert message in capfd.readouterr().err
    assert run_distributed(call, 1, ["export", *MODEL, adapter, output, "format=peft"]) == [2]
    assert f"is of method={method}; only LoRA's can be used so" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_manifest_that_does_not_say_how_many_is_refused(method: str, run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(run_dir / "adapter", copy)
    open_again(copy)
    manifest = read_json(copy / "manifest.json")
    hashes = manifest.pop("sha256")
    write_manifest(copy, hashes, {**manifest, "prefix": {"num_prefix": 3, "num_infix": 1}})
    with pytest.raises(ValueError, match=re.escape("embedding.prefix has shape (5, 64), the model needs (4, 64)")):
        open_again(copy)
    write_manifest(copy, hashes, {**manifest, "prefix": {"num_prefix": "many"}})
    with pytest.raises(ValueError, match="not a num_prefix and a num_infix"):
        open_again(copy)


def test_the_plan_is_of_the_method(method: str) -> None:
    variants = list_variants(compose_config([f"method={method}", "plan.recompute=[none]"]))
    assert [variant.method for variant in variants] == [method, "lora", "full"]
