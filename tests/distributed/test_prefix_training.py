"""Prefix methods: gradients against transformers, every topology against one process, training against plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import test_zero
import torch
import torch.distributed as dist
import torch.nn.functional as F
from family_toy import write_family_checkpoint
from hf_toy import write_toy_checkpoint
from processes import run_distributed
from test_measure_collectives import count_by_kind, count_step
from test_parity import TOLERANCE, compute_error, compute_unsummed_gradients, run_case
from toy import PREFIX, Case, fill, reduce_gradients
from transformers import AutoModelForCausalLM

from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig, ZeroConfig
from lora_dist.data.collate import collate_rows
from lora_dist.data.examples import Examples
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.factors import derive_seed
from lora_dist.mcore.hf_weights import fill_base
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.prefixes import put_prefixes
from lora_dist.mcore.schedule import forward_backward
from lora_dist.prefix.spec import PrefixSpec, build_prefix_specs

LORA = LoraConfig(rank=2, target_modules=["q_proj", "v_proj"], dropout=0.3)
METHODS = ["prefix_layer", "lora_prefix_embed"]
TOPOLOGIES = [
    {"tp_size": 2},
    {"tp_size": 4, "sequence_parallel": True},
    {"pp_size": 2},
    {"tp_size": 2, "dp_size": 2},
    {"recompute": "full"},
    {"tp_size": 2, "pp_size": 2, "recompute": "full", "sequence_parallel": True},
]


@dataclass(frozen=True)
class Row:
    """An example as its parts, end tokens left out."""

    context: list[int]
    target: list[int]


ROWS = [Row([5, 9, 3], [7, 8]), Row([], [4]), Row([11, 2, 6, 1, 1], [12, 3, 9]), Row([42], [17, 5])]
END = 100


def build_examples() -> Examples:
    rows = [[-2, -3, *row.context, END, -4, -5, *row.target, END] for row in ROWS]
    return Examples(
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        starts=np.cumsum([0, *map(len, rows)]),
        is_learnt=np.concatenate(
            [np.arange(len(row)) > len(row) - 2 - len(one.target) for row, one in zip(rows, ROWS, strict=True)]
        ),
        has_slots=True,
    )


def draw_vectors(spec: PrefixSpec) -> torch.Tensor:
    """As `toy.fill` draws them."""
    generator = torch.Generator().manual_seed(derive_seed("toy", spec.name))
    return torch.randn(spec.shape, generator=generator, dtype=torch.float64) * 0.3


def compute_with_transformers(
    method: str, directory: Path, model: ModelConfig
) -> tuple[float, dict[str, torch.Tensor]]:
    """Every example alone; its vectors put into `inputs_embeds`, and over each later block's input."""
    causal = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    layers = find_layers(causal)
    vectors = {spec.layer: draw_vectors(spec).requires_grad_() for spec in build_prefix_specs(method, PREFIX, model)}
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        prompt = [0, 0, *row.context, END, 0, 0]
        places = torch.tensor([0, 1, len(prompt) - 2, len(prompt) - 1])
        tokens = torch.tensor([*prompt, *row.target])
        handles = [
            layers[layer].register_forward_pre_hook(
                lambda _, inputs, one=one, places=places: (inputs[0].index_copy(1, places, one[None]), *inputs[1:])
            )
            for layer, one in vectors.items()
            if layer is not None
        ]
        embeds = causal.get_input_embeddings()(tokens).index_copy(0, places, vectors[None])
        logits = causal(inputs_embeds=embeds[None]).logits[0]
        learnt = torch.tensor([*row.target, END])
        total = total + F.cross_entropy(logits[len(prompt) - 1 :], learnt, reduction="sum")
        for handle in handles:
            handle.remove()
    loss = total / sum(len(row.target) + 1 for row in ROWS)
    loss.backward()
    names = {layer: PrefixSpec(layer=layer, num_slots=4, hidden_size=1).name for layer in vectors}
    return loss.item(), {names[layer]: one.grad for layer, one in vectors.items() if one.grad is not None}


def compute_ours(method: str, model: ModelConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Packed two in a row."""
    topology = build_topology(TopologyConfig(), device=torch.device("cpu"), local_rank=dist.get_rank(), seed=0)
    gpt = build_model(model, topology, dtype=torch.float64, clock=DropoutClock())
    fill_base(gpt, model, seed=0)
    gpt.requires_grad_(False)
    trainable = put_prefixes(gpt, build_prefix_specs(method, PREFIX, model), init_std=0.02, seed=0)
    for one in trainable:
        one.parameter.data = one.parameter.data.double()
        fill(one, topology, std=0.3)
    examples = build_examples()
    rows = [np.array([0, 2]), np.array([3, 1])]
    batch = collate_rows(
        examples,
        rows,
        seq_len=24,
        packed=True,
        row_ids=[0, 1],
        num_loss_tokens=int(examples.num_loss_tokens.sum()),
        num_tokens=int(examples.num_positions.sum()),
    )
    loss, _ = forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


def find_layers(causal: torch.nn.Module) -> torch.nn.ModuleList:
    return next(module for module in causal.modules() if isinstance(module, torch.nn.ModuleList))


@pytest.mark.parametrize(
    ("name", "method"),
    [("gpt2", "prefix_embed"), ("gpt2", "prefix_layer"), ("llama", "prefix_layer"), ("opt", "prefix_layer")],
)
def test_loss_and_gradients_are_those_of_transformers(name: str, method: str, tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path) if name == "gpt2" else write_family_checkpoint(name, tmp_path)
    expected_loss, expected = compute_with_transformers(method, tmp_path, model)
    assert len(expected) == (1 if method == "prefix_embed" else model.num_layers)
    ((loss, actual),) = run_distributed(compute_ours, 1, method, model)
    in_fp64 = name != "llama"  # whose norms and angles transformers computes in fp32
    assert loss == pytest.approx(expected_loss, rel=1e-12 if in_fp64 else 1e-6)
    assert compute_error(actual, expected) < (TOLERANCE if in_fp64 else 1e-5)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def gradients(method: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one process."""
    return run_case(Case(method=method, lora=LORA))


@pytest.mark.parametrize("options", TOPOLOGIES, ids=lambda options: str(Case(**options)))
def test_gradients_equal_one_process(
    method: str, gradients: tuple[float, dict[str, torch.Tensor]], options: dict
) -> None:
    expected_loss, expected = gradients
    assert sum(name.endswith("prefix") for name in expected) == (1 if method.endswith("embed") else 4)
    loss, actual = run_case(Case(method=method, lora=LORA, **options))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


def test_a_stage_without_vectors_passes_their_gradient_on() -> None:
    """prefix_embed trains on the first stage alone, one engine a stage all the same."""
    case, split = Case(method="prefix_embed"), Case(method="prefix_embed", pp_size=2, tp_size=2, sequence_parallel=True)
    (expected_loss, expected), (loss, actual) = run_case(case), run_case(split)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE
    (oracle,) = run_distributed(test_zero.train_oracle, 1, replace(case, dtype=torch.float32))
    results = run_distributed(test_zero.train, 4, replace(split, dtype=torch.float32), ZeroConfig(stage=1))
    for losses, norms, values in results:
        assert losses == pytest.approx(oracle[0], abs=1e-5)
        assert norms == pytest.approx(oracle[1], rel=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(value, oracle[2][name], atol=1e-5, rtol=0)


TRAINED = {"dtype": torch.float32, "lora": LORA}


@pytest.fixture(scope="module")
def trained(method: str) -> Iterator[test_zero.Trained]:
    """By plain torch in one process, clipped like everything that runs while this fixture lives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_zero, "NUM_STEPS", 3)
        patch.setattr(test_zero, "OPTIM", replace(test_zero.OPTIM, clip_grad_norm=0.01))  # gradients are small
        yield run_distributed(test_zero.train_oracle, 1, Case(method=method, **TRAINED))[0]


@pytest.mark.parametrize(
    ("options", "stage"),
    [
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


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_no_collective_is_added(sequence_parallel: bool) -> None:
    """To a layer. Sequence parallelism gathers the word embeddings' gradient of each of the two microbatches, and sums
    once a step what enters the layers."""
    options = {"tp_size": 2, "sequence_parallel": sequence_parallel}
    base, _ = run_distributed(count_step, 2, Case(**options), [], True)[0]
    ours, after = run_distributed(count_step, 2, Case(method="prefix_layer", **options), ["q_proj"], True)[0]
    assert count_by_kind(ours) - count_by_kind(base) == ({("all_gather", "tp", False): 2} if sequence_parallel else {})
    assert count_by_kind(base) <= count_by_kind(ours)
    assert [(one.op, one.group, one.count) for one in after] == [("all_reduce", "tp", 1)] * sequence_parallel


def test_an_unsummed_partial_gradient_is_seen() -> None:
    """Without the one sum a step that sequence parallelism needs, the oracle comparison must fail."""
    _, expected = run_case(Case(method="prefix_layer"))
    case = Case(method="prefix_layer", tp_size=2, sequence_parallel=True)
    results = run_distributed(compute_unsummed_gradients, 2, case)
    assert compute_error(results[0][1], expected) > 1e-2
