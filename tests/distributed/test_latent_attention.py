"""Attention out of latents: dropout, DoRA, PiSSA, norms that train and analysis where TP ranks hold linears whole."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from family_toy import read_family_config, write_family_checkpoint
from hf_toy import compute_logits, count_processes, draw_adapter_values
from processes import run_alone, run_distributed
from test_analyse import analyse
from test_family_gradients import MODELS, TOLERANCE, TOPOLOGIES, run_case
from test_parity import compute_error
from test_pissa import start
from tiers import few_of
from toy import Case, merge_results

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, TopologyConfig
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.generation.batches import pad_left
from lora_dist.generation.decode import Choice
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.attention import SdpaAttention
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.incremental import open_incremental
from lora_dist.mcore.indexer_weights import open_indexers
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, attach_adapters, attach_alone, load_shards
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import build_topology

LINEARS = ["q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"]
MODEL = MODELS["deepseek_v3"]
LORAS = {
    "dropout": LoraConfig(rank=3, target_modules=LINEARS, dropout=0.3),
    "dora": LoraConfig(rank=3, target_modules=LINEARS, use_dora=True),
    "norms": LoraConfig(rank=2, target_modules=["kv_a_proj"], modules_to_save=["q_a_layernorm", "kv_a_layernorm"]),
    "lowest": LoraConfig(rank=2, target_modules=["q_a_proj"], layers=["0"]),
}


@pytest.mark.parametrize("kind", few_of(LORAS, "dora", "norms"))
def test_gradients_equal_one_process(kind: str) -> None:
    case = Case(model=MODEL, lora=LORAS[kind])
    expected_loss, expected = run_case(case)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for options in TOPOLOGIES:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert actual.keys() == expected.keys()
        assert compute_error(actual, expected) < TOLERANCE, options


@pytest.mark.parametrize("options", [TOPOLOGIES[0], TOPOLOGIES[1], {"tp_size": 2, "dp_size": 2}], ids=str)
def test_pissa_starts_and_learns_alike(options: dict) -> None:
    case = Case(model=MODEL, lora=LoraConfig(rank=3, alpha=5, target_modules=LINEARS, init="pissa"))
    expected_loss, expected = merge_results([run_alone(start, case)])
    case = replace(case, **options)
    loss, actual = merge_results(run_distributed(start, case.world_size, case))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


def check_analysis(family: str, linears: list[str], num_adapted: int, tmp_path: Path) -> None:
    """Two adapters on those linears give the same numbers over two shards."""
    model = write_family_checkpoint(family, tmp_path / "base")
    for name, rank in (("r2", 2), ("r5", 5)):
        specs = build_adapter_specs(LoraConfig(rank=rank, target_modules=linears), model)
        adapter = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
        fingerprint = compute_base_fingerprint(model, 0)
        write_adapter_directory(tmp_path / name, adapter, model, {"task": name}, base_fingerprint=fingerprint)
    whole = analyse(tmp_path, tmp_path / "one", 1)["amplification"]
    split = analyse(tmp_path, tmp_path / "two", 2, "topology.tp_size=2")["amplification"]
    assert len(whole) == len(split) == 2 * num_adapted
    for one, other in zip(whole, split, strict=True):
        numbers = {key: value for key, value in one.items() if not isinstance(value, str)}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


def test_what_ranks_hold_whole_counts_once_in_an_analysis(tmp_path: Path) -> None:
    check_analysis("deepseek_v3", LINEARS, 4 * len(LINEARS), tmp_path)


@pytest.mark.parametrize("blocks", [None, ((5, 7),) * 2], ids=["rows", "blocks"])
def test_values_of_fewer_features_than_keys(blocks: tuple | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, 2, 3, size, dtype=torch.float64) for size in (10, 10, 6))
    attention = SdpaAttention(SimpleNamespace(attention_dropout=0.0, softmax_scale=None))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    if blocks is not None:
        mask[5:, :5] = False
    scores = torch.einsum("sbad,tbad->bast", query, key) / 10**0.5
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    expected = torch.einsum("bast,tbav->sbav", weights, value).flatten(2)
    torch.testing.assert_close(attention(query, key, value, blocks), expected)


PROMPTS = [[5, 3, 8, 9, 4, 7, 6, 2, 1, 11, 13] * 3, [7, 2, 9, 1, 4] * 5]
SOURCES = [[0, 1, 1], [2, 0, 1], [0, 1, 2]]
"""Of the rows of each step, as beams go on from others."""


def load_adapter(gpt: ShardedGpt, lora: LoraConfig) -> LoadedAdapter:
    specs = build_adapter_specs(lora, gpt.model)
    return load_shards(gpt, f"r{lora.rank}", specs, draw_adapter_values(specs, gpt.model, "none"))


def adapt(gpt: ShardedGpt, kind: str) -> tuple[int | None, ...]:
    """The prompts' adapters where they have each their own."""
    first, second = (LoraConfig(rank=rank, target_modules=LINEARS) for rank in (2, 5))
    if kind == "merged":
        LiveMerge(gpt).merge(load_adapter(gpt, first))
    elif kind == "mixed":
        attach_adapters(gpt, [load_adapter(gpt, first), load_adapter(gpt, second)])
        return (1, 0)
    elif kind == "some":
        attach_adapters(gpt, [load_adapter(gpt, first)])
        return (None, 0)
    elif kind != "none":
        attach_alone(gpt, load_adapter(gpt, replace(first, use_dora=kind == "dora")))
    return ()


def compare_steps(gpt: ShardedGpt, adapter_of_row: tuple[int | None, ...]) -> float:
    """The largest difference of logits, from step to step and of each text as a whole; 0 where another has them."""
    texts, names, error = PROMPTS, adapter_of_row, 0.0
    stepped, whole = [], []
    with open_incremental(gpt, num_rows=3, num_columns=40) as model:
        model.prefill(pad_left(PROMPTS, range(2), adapter_of_row, torch.device("cpu")))
        for token, source in enumerate(SOURCES, 20):
            texts, names = [[*texts[row], token + row] for row in source], tuple(names[row] for row in source if names)
            tokens_R, source_R = torch.tensor([text[-1] for text in texts]), torch.tensor(source)
            stepped.append(model.step(Choice(tokens_R=tokens_R, source_R=source_R, finished=False)))
            whole += [(text, names[row : row + 1]) for row, text in enumerate(texts)]
    for number, (text, own) in enumerate(whole):
        gpt.clock.adapter_of_row = own
        expected, actual = compute_logits(gpt, torch.tensor([text])), stepped[number // 3]
        if actual is not None:
            error = max(error, (actual[number % 3] - expected[0, -1]).abs().max().item())
    return error


@torch.no_grad()
def measure_steps(options: dict, base: Path, kinds: list[str]) -> dict[str, float]:
    model, errors = read_family_config(base), {}
    topology = build_topology(TopologyConfig(**options), device=torch.device("cpu"), local_rank=dist.get_rank(), seed=1)
    for kind in kinds:
        gpt = build_model(model, topology, dtype=torch.float64, clock=DropoutClock())
        load_hf_checkpoint(gpt, base)
        open_indexers(gpt, 40)
        errors[kind] = compare_steps(gpt, adapt(gpt, kind))
    return errors


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa"])
def test_steps_over_latents_give_the_logits_of_whole_texts(family: str, tmp_path: Path) -> None:
    """Of the base, adapters in the weights, beside them and of each row; GLM's second text grows into its indexers."""
    write_family_checkpoint(family, tmp_path)
    kinds = ["none", "merged", "alone", "dora", "mixed", "some"]
    for options in ({}, {"tp_size": 2, "pp_size": 2}):
        for errors in run_distributed(measure_steps, count_processes(options), options, tmp_path, kinds):
            assert max(errors.values()) < 1e-10, errors
