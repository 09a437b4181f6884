"""More tensor-parallel ranks than key-value heads: a head on several ranks changes nothing but where it lies."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_zero
import torch
from data_files import tokenizer_directory
from family_models import SIZES
from family_toy import compute_family_logits, read_family_config
from hf_toy import build_shard, compute_logits, count_processes, draw_tokens
from processes import run_distributed
from safetensors.torch import load_file
from test_adapters_mixed import compare_mixed_with_alone
from test_baselines import call, read_losses, run_training
from test_family_gradients import TOLERANCE, build_toy, run_case
from tiers import exhaustive, few_of
from toy import SEVEN_TARGETS, Case
from transformers import (
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_dist import gradients
from lora_dist.analyse_job import cut_weight
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, ModelConfig, ZeroConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.plan.search import compute_weight_bytes, list_candidates

TOPOLOGIES = [
    {"tp_size": 4},
    {"tp_size": 4, "sequence_parallel": True, "recompute": "selective"},
    {"tp_size": 2, "pp_size": 2, "recompute": "full"},
]
METHODS = {
    "lora": {"lora": LoraConfig(rank=3, target_modules=SEVEN_TARGETS)},
    "dora": {"lora": LoraConfig(rank=3, target_modules=SEVEN_TARGETS, use_dora=True)},
    "biases": {"lora": LoraConfig(rank=2, target_modules=["q", "k", "v"], bias="lora_only", modules_to_save=["norm"])},
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit"},
    "whole lora": {"lora": LoraConfig(rank=3, target_modules=["all"])},
    "whole norms": {"lora": LoraConfig(rank=3, target_modules=["q", "k"], modules_to_save=["q_norm", "k_norm"])},
    "whole full": {"method": "full"},
}
"""The whole ones of models whose keys are normalised over all heads, of which each counts once."""
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 12}


def build_model(num_kv_heads: int, method: str = "lora") -> ModelConfig:
    family, sizes = ("minimax_m2", EXPERTS) if method.startswith("whole") else ("qwen2", {})
    return build_toy(family, num_kv_heads=num_kv_heads, tied_output=False, **sizes)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("method", few_of(METHODS, "lora", "biases", "full", "whole norms"))
def test_gradients_equal_one_process(method: str, num_kv_heads: int) -> None:
    case = Case(model=build_model(num_kv_heads, method), **METHODS[method])
    expected_loss, expected = run_case(case)
    for options in TOPOLOGIES:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            error = (actual[key] - gradient).abs().max() / gradient.abs().max()
            assert error < TOLERANCE, (options, key)


def test_an_unsummed_shared_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sum over the ranks that share a head, the oracle comparison must fail."""
    case = Case(model=build_model(1), **METHODS["lora"])
    _, expected = run_case(case)
    monkeypatch.setattr(gradients, "_spread", lambda one, tp_rank: one.parameter.grad.new_zeros(one.full_shape))
    actual = run_case(replace(case, tp_size=2))[1]
    for key, gradient in expected.items():
        is_shared = key.endswith(("k_proj.lora_B", "v_proj.lora_B"))
        assert ((actual[key] - gradient).abs().max() > 0.1 * gradient.abs().max()) == is_shared, key


@pytest.fixture(scope="module", params=["lora", "full", *exhaustive("whole norms")])
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[Case, test_zero.Trained]]:
    """By plain torch in one process, every step clipped: a row counted twice in the norm would show."""
    model = replace(build_model(2, request.param), tied_output=request.param == "full")
    case = Case(model=model, dtype=torch.float32, **METHODS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_zero, "NUM_STEPS", 3)
        patch.setattr(test_zero, "OPTIM", replace(test_zero.OPTIM, clip_grad_norm=0.05))
        yield case, run_distributed(test_zero.train_oracle, 1, case)[0]


@pytest.mark.parametrize(
    ("options", "stages"), [({"tp_size": 4}, [0, 1]), ({"tp_size": 4, "sequence_parallel": True}, [0, 2])], ids=str
)
def test_trains_like_plain_torch(options: dict, stages: list[int], trained: tuple[Case, test_zero.Trained]) -> None:
    case, oracle = trained
    stage = stages[case.method == "lora"]
    results = run_distributed(test_zero.train, 4, replace(case, **options), ZeroConfig(stage=stage))
    test_zero.assert_trained_alike(results, oracle)


def write_checkpoint(num_kv_heads: int, family: str, directory: Path) -> None:
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "minimax_m2": (partial(MiniMaxM2Config, num_local_experts=4, num_experts_per_tok=2), MiniMaxM2ForCausalLM),
    }[family]
    config = config_class(**SIZES | {"num_key_value_heads": num_kv_heads, "head_dim": 4})
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + drawn if "norm" in name else drawn)
    model.save_pretrained(directory)


def weigh(model: ModelConfig) -> int:
    return sum(parameter.nbytes for parameter in build_shard({"tp_size": 4}, model).parameters())


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("method", ["lora", "whole lora"])
def test_the_planned_weights_are_those_of_a_rank(method: str, num_kv_heads: int) -> None:
    """Norms of keys too, which are as the keys are."""
    model = build_model(num_kv_heads, method)
    weights = run_distributed(weigh, 4, model)
    assert max(weights) == compute_weight_bytes(model, "fp32", tp_size=4, pp_size=1)


def load_compute_and_write(options: dict, source: Path, target: Path) -> torch.Tensor | None:
    model = read_family_config(source)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=model)
    return compute_logits(gpt)


@pytest.mark.parametrize(
    ("family", "num_kv_heads", "options"),
    [
        ("qwen2", 1, {"tp_size": 4, "sequence_parallel": True}),
        ("qwen2", 2, {"tp_size": 4}),
        ("qwen3", 1, {"tp_size": 2, "pp_size": 2}),
        ("minimax_m2", 2, {"tp_size": 4}),
    ],
    ids=str,
)
def test_logits_equal_transformers_and_files_come_back(
    family: str, num_kv_heads: int, options: dict, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_checkpoint(num_kv_heads, family, source)
    expected = compute_family_logits(source, draw_tokens())
    for logits in run_distributed(load_compute_and_write, count_processes(options), options, source, target):
        assert logits is None or (logits - expected).abs().max() < 1e-4
    stored, written = (load_file(directory / "model.safetensors") for directory in (source, target))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_a_run_is_that_of_one_process(init: str, tmp_path: Path) -> None:
    """Trained on four ranks and on one, resumed and merged on others, and asked for text."""
    base = tmp_path / "base"
    write_checkpoint(2, "qwen2", base)
    model = ["model=hf", f"model.checkpoint={base}", f"model.tokenizer={tokenizer_directory()}", "data=fake"]
    words = [*model, "data.seq_len=16", "track=none", "loop.num_steps=4", "loop.save_every=2", "optim.lr=1e-2"]
    words += ["lora.target_modules=[all]", f"lora.init={init}", "loop.micro_batch_size=4", "data.num_fake_examples=16"]
    for name, num_processes in (("one", 1), ("four", 4)):
        run_distributed(
            run_training, num_processes, [*words, f"topology.tp_size={num_processes}", f"run_dir={tmp_path / name}"]
        )
    expected = read_losses(tmp_path / "one")
    assert read_losses(tmp_path / "four") == pytest.approx(expected, rel=1e-5)
    summary = json.loads((tmp_path / "four" / "summary.json").read_text())
    assert (
        summary["num_trainable_parameters"]
        == json.loads((tmp_path / "one/summary.json").read_text())["num_trainable_parameters"]
    )
    for step in ("checkpoints/step-000004", "adapter"):
        shutil.rmtree(tmp_path / "four" / step)
    run_distributed(run_training, 2, [*words, "topology.tp_size=2", f"run_dir={tmp_path / 'four'}", "resume=must"])
    assert read_losses(tmp_path / "four") == pytest.approx(expected, rel=1e-5)
    for name in ("one", "four"):
        command = [
            "merge",
            *model[:3],
            f"adapter={tmp_path / name / 'adapter'}",
            f"output={tmp_path / name / 'merged'}",
        ]
        assert run_distributed(call, 4, [*command, "topology.tp_size=4"]) == [0] * 4
    merged = [compute_family_logits(tmp_path / name / "merged", draw_tokens()) for name in ("one", "four")]
    assert (merged[0] - merged[1]).abs().max() < 1e-3 * merged[0].abs().max()
    assert (merged[0] - compute_family_logits(base, draw_tokens())).abs().max() > 0.01 * merged[0].abs().max()


HEADS = ["model.num_heads=24", "model.head_size=128", "model.ffn_hidden_size=12288"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*HEADS, "topology.tp_size=12"], "tp 12 neither divides num_kv_heads 8 nor is a multiple of it"),
        (["method=full"], "keeps each of 8 key-value heads on several ranks, which DeepSpeed's norm"),
        (["method=bitfit", "model.family=qwen2"], "use zero.stage=0 or a smaller tp_size"),
        (["lora.bias=all", "model.family=qwen2"], "use zero.stage=0 or a smaller tp_size"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(["model=llama3_8b", "data=fake", "topology.tp_size=16", *overrides])


def test_the_search_proposes_more_ranks_than_heads() -> None:
    config = compose_config(["model=llama3_8b", "data=fake", "plan.num_gpus=32"])
    assert {one.tp_size for one in list_candidates(config)} == {1, 2, 4, 8, 16, 32}


def test_analyse_refuses_what_it_would_count_twice(tmp_path: Path) -> None:
    def cut(base: Path) -> str:
        gpt = build_shard({"tp_size": 4}, read_family_config(base))
        spec = next(one for one in build_adapter_specs(LoraConfig(), gpt.model) if one.target == "v_proj")
        with pytest.raises(ValueError, match="several ranks, which analyse would count twice; use at most 2"):
            cut_weight(gpt, spec)
        return "refused"

    write_checkpoint(2, "qwen2", tmp_path)
    assert run_distributed(cut, 4, tmp_path) == ["refused"] * 4


def test_a_mixed_batch_is_that_of_one_process(tmp_path: Path) -> None:
    write_checkpoint(2, "qwen2", tmp_path)
    (expected,) = run_distributed(compare_mixed_with_alone, 1, {}, tmp_path, "none")
    for actual in run_distributed(compare_mixed_with_alone, 4, {"tp_size": 4}, tmp_path, "none"):
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (actual[name] - gradient).abs().max() < TOLERANCE * gradient.abs().max(), name
