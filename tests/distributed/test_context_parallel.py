"""Rows split over processes: gradients of every family and method as one process has them, and what it costs."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from processes import run_distributed
from test_family_gradients import MODELS, build_case_of, run_case
from tiers import few_of
from toy import ALL_TARGETS, BLOCKS, MODEL, NUM_ROWS, SEQ_LEN, Case, build_batches, build_case, reduce_gradients

from lora_dist.config import LoraConfig
from lora_dist.mcore import context_attention
from lora_dist.mcore.kernels import ON_CPU
from lora_dist.mcore.parallel import seed_base_dropout
from lora_dist.mcore.schedule import evaluate_loss, forward_backward
from lora_dist.measure.collectives import count_collectives

TOLERANCE = 1e-9
TOPOLOGIES = [
    {"cp_size": 4},
    {"tp_size": 2, "cp_size": 2, "sequence_parallel": True},
    {"cp_size": 2, "pp_size": 2, "recompute": "full"},
]
FAMILIES = [
    *((name, "lora") for name, model in MODELS.items() if not model.selects(SEQ_LEN)),  # which is refused
    *((name, "full") for name in ("gpt_oss", "gemma3_text", "minimax_m2", "olmo3", "deepseek_v3", "qwen3_next")),
]
ALWAYS = [FAMILIES[-1], ("gpt_oss", "lora"), ("gemma3_text", "full"), ("deepseek_v3", "lora"), ("minimax_m2", "lora")]


def assert_alike(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tied: bool) -> None:
    if tied:
        actual.pop("output_layer.weight", None)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() < TOLERANCE * gradient.abs().max(), name


@pytest.mark.parametrize(("name", "method"), few_of(FAMILIES, *ALWAYS))
def test_gradients_of_every_family(name: str, method: str) -> None:
    """Sinks, windows, latents whose values are narrower than keys, experts, norms over all heads, gated DeltaNets."""
    expected_loss, expected = run_case(build_case_of(name, method))
    for options in TOPOLOGIES:
        loss, actual = run_case(build_case_of(name, method, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12), options
        assert_alike(actual, expected, tied=MODELS[name].tied_output)


METHODS = {
    "dora": Case(lora=LoraConfig(rank=3, target_modules=ALL_TARGETS, use_dora=True)),
    "bitfit": Case(method="bitfit"),
    "adapter_h": Case(method="adapter_h"),
    "adapter_l": Case(method="adapter_l"),
    "prefix_embed": Case(method="prefix_embed"),
    "prefix_layer": Case(method="prefix_layer"),
    "modules_to_save": Case(lora=LoraConfig(rank=3, target_modules=["q_proj"], modules_to_save=["wte"])),
}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method(method: str) -> None:
    case = METHODS[method]
    expected_loss, expected = run_case(case)
    for options in TOPOLOGIES[1:]:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12), options
        assert_alike(actual, expected, tied=True)


def compute_padded(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Of rows that hold one example each."""
    gpt, trainable, topology = build_case(case)
    loss, _ = forward_backward(gpt, build_batches(topology, packed=False), seed=0, step=3, scale_loss=None)
    assert evaluate_loss(gpt, build_batches(topology, packed=False)) > 0
    return loss, reduce_gradients(trainable, topology)


def compute_mixed(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Of rows with other examples each."""
    gpt, trainable, topology = build_case(case)
    batches = [replace(batch, row_blocks=(BLOCKS, (3, SEQ_LEN - 3))) for batch in build_batches(topology)]
    loss, _ = forward_backward(gpt, batches, seed=0, step=3, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


@pytest.mark.parametrize("case", [Case(), build_case_of("qwen3_next", "full")], ids=str)
@pytest.mark.parametrize("compute", [compute_padded, compute_mixed], ids=lambda function: function.__name__)
def test_rows_of_every_kind(compute: object, case: Case) -> None:
    expected_loss, expected = run_distributed(compute, 1, case)[0]
    for loss, actual in run_distributed(compute, 4, replace(case, cp_size=4)):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert_alike(actual, expected, tied=False)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_a_kernel_that_takes_no_shared_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As V100's: heads are written out, and their gradients summed."""
    _, expected = run_case(build_case_of(name, "lora"))
    kernel = replace(ON_CPU, takes_shared_heads=False)
    monkeypatch.setattr(context_attention, "choose_kernel", lambda *_: kernel)
    _, actual = run_case(build_case_of(name, "lora", cp_size=2))
    assert_alike(actual, expected, tied=MODELS[name].tied_output)


def count_in_layers(case: Case) -> set[tuple[str, str, float, int]]:
    """Operation, group, calls a layer and microbatch, and the bytes of one."""
    gpt, _, topology = build_case(case)
    with count_collectives(topology, list(gpt.decoder.layers)) as counter:
        forward_backward(gpt, build_batches(topology), seed=0, step=3, scale_loss=None)
    num = 2 * gpt.num_stage_layers
    return {(one.op, one.group, one.count / num, one.payload_bytes) for one in counter.read() if one.in_layer}


@pytest.mark.parametrize("case", [Case(cp_size=2), Case(cp_size=2, method="full")], ids=lambda case: case.method)
def test_a_layer_gathers_twice_and_scatters_once(case: Case) -> None:
    """Keys and values of whole rows, forward and backward, and their gradients; nothing for an adapter."""
    num_bytes = NUM_ROWS // 2 * SEQ_LEN * 2 * MODEL.hidden_size * torch.float64.itemsize
    for counted in run_distributed(count_in_layers, 2, case):
        assert counted == {("all_gather", "cp", 2, num_bytes), ("reduce_scatter", "cp", 1, num_bytes)}


def test_a_gated_delta_net_exchanges_positions_for_heads_and_back() -> None:
    """Both ways, forward and backward; backward computes its heads again and exchanges nothing for that."""
    case = build_case_of("qwen3_next", "lora", cp_size=2)
    model = MODELS["qwen3_next"]
    num_delta = sum(model.has_delta_net(layer) for layer in range(model.num_layers))
    for counted in run_distributed(count_in_layers, 2, case):
        calls = sum(count for op, group, count, _ in counted if (op, group) == ("all_to_all", "cp"))
        assert calls == pytest.approx(4 * num_delta / model.num_layers)
        assert {group for _, group, *_ in counted} == {"cp"}


def draw_for_base_dropout(case: Case) -> tuple[int, list[float]]:
    _, _, topology = build_case(case)
    seed_base_dropout(topology, seed=1, step=0)
    return topology.cp_rank, torch.rand(3).tolist()


def test_parts_of_a_row_drop_other_activations() -> None:
    """Of the base; ranks of one tensor-parallel group drop the same where each has all of them."""
    drawn = defaultdict(list)
    for cp_rank, numbers in run_distributed(draw_for_base_dropout, 4, Case(tp_size=2, cp_size=2)):
        drawn[cp_rank].append(numbers)
    assert drawn[0][0] == drawn[0][1] != drawn[1][0] == drawn[1][1]
