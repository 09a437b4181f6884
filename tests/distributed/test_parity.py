"""Gradients of every topology against the one-process oracle in fp64, B not zero; and that broken variants are seen."""

from dataclasses import replace

import pytest
import torch
from processes import run_alone, run_distributed
from tiers import exhaustive, few_of
from toy import ALL_TARGETS, MODEL, Case, build_batches, build_case, compute_gradients, merge_results, reduce_gradients

from lora_dist.config import LoraConfig
from lora_dist.lora import layer as lora_layer
from lora_dist.lora.row_groups import can_group
from lora_dist.mcore.experts import ExpertMlp
from lora_dist.mcore.schedule import forward_backward

TOLERANCE = 1e-9
EXPERT_TARGETS = ["gate_proj", "up_proj", "down_proj"]
TOPOLOGIES = [
    {"tp_size": 2},
    {"tp_size": 4},
    {"tp_size": 2, "sequence_parallel": True},
    {"tp_size": 4, "sequence_parallel": True},
    {"pp_size": 2},
    {"pp_size": 4},
    {"pp_size": 3},
    {"dp_size": 2},
    {"tp_size": 2, "pp_size": 2},
    {"tp_size": 2, "dp_size": 2},
    {"tp_size": 2, "pp_size": 2, "sequence_parallel": True},
    {"recompute": "full"},
    {"recompute": "selective"},
    {"recompute": "full", "recompute_layers": 1},
    {"pp_size": 2, "recompute": "selective", "recompute_layers": 1},
    {"tp_size": 2, "recompute": "selective", "sequence_parallel": True},
    {"cp_size": 2},
    {"cp_size": 4},
    {"cp_size": 2, "recompute": "full"},
    {"cp_size": 2, "dp_size": 2},
    {"cp_size": 2, "pp_size": 2, "recompute": "selective"},
    {"tp_size": 2, "cp_size": 2, "sequence_parallel": True},
    {"tp_size": 2, "pp_size": 2, "recompute": "full", "sequence_parallel": True},
]
FEW = (
    TOPOLOGIES[-2],
    {"tp_size": 4, "sequence_parallel": True},
    {"tp_size": 2, "dp_size": 2},
    TOPOLOGIES[15],
    TOPOLOGIES[-1],
)
"""Which have every kind of split and of recomputation between them."""


def run_case(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    if case.world_size == 1:
        return merge_results([run_alone(compute_gradients, case)])
    return merge_results(run_distributed(compute_gradients, case.world_size, case))


def compute_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference over all gradients, relative to each one's largest element."""
    copy = actual.pop("output_layer.weight", None)  # the last stage's copy of the tied embedding
    if copy is not None:
        torch.testing.assert_close(copy, actual["embedding.word_embeddings.weight"], atol=1e-12, rtol=0)
    assert actual.keys() == expected.keys()
    return max(((actual[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected)


@pytest.mark.parametrize("options", TOPOLOGIES, ids=lambda options: str(Case(**options)))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_equal_one_process(method: str, options: dict) -> None:
    expected_loss, expected = run_case(Case(method=method))
    loss, actual = run_case(Case(method=method, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("options", few_of(TOPOLOGIES, *FEW), ids=lambda options: str(Case(**options)))
def test_lora_dropout_is_the_same_everywhere(options: dict) -> None:
    lora = LoraConfig(rank=1, target_modules=["q_proj", "v_proj", "down_proj"], dropout=0.3)
    expected_loss, expected = run_case(Case(lora=lora))
    loss, actual = run_case(Case(lora=lora, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE
    assert expected_loss != run_case(Case(lora=LoraConfig(rank=1, target_modules=lora.target_modules)))[0]


@pytest.mark.parametrize(
    "targets", [["v_proj"], ["k_proj", "up_proj"], *exhaustive(["q_proj"], ["o_proj"], ["down_proj"])]
)
def test_any_subset_of_targets(targets: list[str]) -> None:
    lora = LoraConfig(rank=3, target_modules=targets, layers=["1", "2"])
    _, expected = run_case(Case(lora=lora))
    for options in ({"tp_size": 2}, {"tp_size": 4, "sequence_parallel": True}, {"pp_size": 2}):
        assert compute_error(run_case(Case(lora=lora, **options))[1], expected) < TOLERANCE


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_size": 2, "sequence_parallel": True}, {"pp_size": 2}])
def test_biases_beside_linears_without_an_adapter(options: dict) -> None:
    lora = LoraConfig(rank=3, target_modules=["o_proj"], bias="all")
    _, expected = run_case(Case(lora=lora))
    assert compute_error(run_case(Case(lora=lora, **options))[1], expected) < TOLERANCE


def test_label_smoothing() -> None:
    expected_loss, expected = run_case(Case(label_smoothing=0.1))
    loss, actual = run_case(Case(label_smoothing=0.1, tp_size=4))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


def compute_unsummed_gradients(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    gpt, trainable, topology = build_case(case)
    loss, _ = forward_backward(gpt, build_batches(topology), seed=0, step=3, scale_loss=None)
    for described in trainable:
        described.tp_partial_grad = False
    return loss, reduce_gradients(trainable, topology)


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("full", {"sequence_parallel": True})])
def test_an_unsummed_partial_gradient_is_seen(method: str, options: dict) -> None:
    """Breaks the one sum a step: without it the oracle comparison must fail, or it proves nothing."""
    _, expected = run_case(Case(method=method))
    results = run_distributed(compute_unsummed_gradients, 2, Case(method=method, tp_size=2, **options))
    assert compute_error(results[0][1], expected) > 1e-2


def test_a_wrong_interleave_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the fused projection's row order: [all q | all k | all v] instead of head by head."""
    lora = LoraConfig(rank=3, target_modules=ALL_TARGETS)
    _, expected = run_case(Case(lora=lora))

    def concatenated_rows(
        num_groups: int, num_query_heads_per_group: int, head_dim: int, *, gated: bool
    ) -> dict[str, torch.Tensor]:
        assert not gated
        rows = torch.arange(num_groups * (num_query_heads_per_group + 2) * head_dim).chunk(3)
        return dict(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True))

    monkeypatch.setattr(lora_layer, "compute_qkv_rows", concatenated_rows)
    assert compute_error(run_case(Case(lora=lora, tp_size=2))[1], expected) > 1e-2


def compute_grouped_gradients(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    gpt, trainable, topology = build_case(case)
    mlps = [module for module in gpt.modules() if isinstance(module, ExpertMlp)]
    assert {mlp.grouped for mlp in mlps} == {False}, "this is a CPU"
    for mlp in mlps:
        mlp.grouped = True
    loss, _ = forward_backward(gpt, build_batches(topology), seed=0, step=3, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


@pytest.mark.parametrize("options", [{}, {"tp_size": 2, "sequence_parallel": True}, {"recompute": "full"}], ids=str)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_product_for_all_experts_gives_the_same(method: str, options: dict) -> None:
    """As on a GPU in bf16; here in fp32, which is the most this product takes. A rank is filled up to eight."""
    model = replace(MODEL, family="qwen3_moe", ffn_hidden_size=16, num_experts=5, experts_per_token=2, init_std=0.1)
    lora = LoraConfig(rank=3, rank_pattern={r"layers\.2\..*": 8}, target_modules=["v_proj", *EXPERT_TARGETS])
    case = Case(method=method, model=model, lora=lora)
    expected_loss, expected = run_case(case)
    single = replace(case, dtype=torch.float32, **options)
    loss, actual = merge_results(run_distributed(compute_grouped_gradients, single.world_size, single))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert compute_error(actual, expected) < 1e-4


def test_where_there_is_one_product_for_all_experts() -> None:
    assert can_group(torch.bfloat16, 2048, 192, on_gpu=True)
    assert not can_group(torch.bfloat16, 2048, 192, on_gpu=False)
    assert not can_group(torch.float16, 2048, 192, on_gpu=True)
    assert not can_group(torch.bfloat16, 2048, 100, on_gpu=True)
