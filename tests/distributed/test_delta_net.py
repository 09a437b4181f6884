"""Gated DeltaNets in shards: examples packed in several ways, DoRA, PiSSA, analysis, and texts out of many chunks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from family_toy import build_family_model, read_family_config, write_family_checkpoint
from generation_judge import GREEDY, draw_prompts, generate_with_transformers
from hf_toy import build_shard
from processes import run_alone, run_distributed
from test_family_gradients import MODELS, TOLERANCE, TOPOLOGIES, run_case
from test_latent_attention import check_analysis
from test_parity import compute_error
from test_pissa import start
from tiers import exhaustive
from toy import BLOCKS, SEQ_LEN, Case, build_batches, build_case, merge_results, reduce_gradients

from lora_dist.config import LoraConfig
from lora_dist.mcore import delta_rule
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.schedule import forward_backward

LINEARS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]
MODEL = MODELS["qwen3_next"]
LORAS = {
    "dropout": LoraConfig(rank=3, target_modules=LINEARS, dropout=0.3),
    "dora": LoraConfig(rank=3, target_modules=LINEARS, use_dora=True),
    "lowest": LoraConfig(rank=2, target_modules=["in_proj_ba"], layers=["0"]),
}


@pytest.mark.parametrize("kind", [*exhaustive("dropout", "lowest"), "dora"])
def test_gradients_equal_one_process(kind: str) -> None:
    case = Case(model=MODEL, lora=LORAS[kind])
    expected_loss, expected = run_case(case)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for options in TOPOLOGIES[1:4:2]:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert actual.keys() == expected.keys()
        assert compute_error(actual, expected) < TOLERANCE, options


@pytest.mark.parametrize("options", [TOPOLOGIES[1], *exhaustive({"tp_size": 2, "dp_size": 2})], ids=str)
def test_pissa_starts_and_learns_alike(options: dict) -> None:
    case = Case(model=MODEL, lora=LoraConfig(rank=3, alpha=5, target_modules=LINEARS, init="pissa"))
    expected_loss, expected = merge_results([run_alone(start, case)])
    case = replace(case, **options)
    loss, actual = merge_results(run_distributed(start, case.world_size, case))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert compute_error(actual, expected) < TOLERANCE


def learn(case: Case, blocks: bool, chunk_size: int, padded: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """A step on packed rows, whose last `padded` positions may be anything: no target is there."""
    delta_rule.CHUNK_SIZE = chunk_size
    gpt, trainable, topology = build_case(case)
    gpt.attends_in_blocks = blocks
    batches = build_batches(topology)
    for batch in batches:
        batch.loss_mask_BS = batch.loss_mask_BS & (torch.arange(SEQ_LEN) < SEQ_LEN - 4)
        batch.input_ids_BS = batch.input_ids_BS.clone()
        batch.input_ids_BS[:, SEQ_LEN - padded :] = 7
        batch.row_blocks = ((BLOCKS[0], BLOCKS[1] - padded, *[padded] * (padded > 0)),) * len(batch.input_ids_BS)
    loss, _ = forward_backward(gpt, batches, seed=0, step=0, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


def test_it_does_not_matter_how_examples_are_packed_and_cut_into_chunks() -> None:
    """Block by block or under a mask, in one chunk or several, before padding or before nothing."""
    case = Case(model=replace(MODEL, tied_output=True), method="full")
    expected_loss, expected = run_alone(learn, case, True, 64)
    for options in ((False, 64), (True, 4), (False, 3), (True, 4, 4)):
        loss, actual = run_alone(learn, case, *options)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert compute_error(actual, expected) < TOLERANCE, options


def generate(base: Path) -> list[list[int]]:
    delta_rule.CHUNK_SIZE = 4
    gpt = build_shard({"tp_size": 2}, read_family_config(base))
    load_hf_checkpoint(gpt, base)
    rows = generate_rows(gpt.requires_grad_(False), draw_prompts(), GREEDY, end_tokens=[0])
    dist.barrier()
    return rows


def test_contexts_of_several_chunks_and_lengths_go_on_as_transformers(tmp_path: Path) -> None:
    write_family_checkpoint("qwen3_next", tmp_path)
    expected = generate_with_transformers(build_family_model("qwen3_next"), draw_prompts(), GREEDY, [0])
    assert run_distributed(generate, 2, tmp_path) == [expected] * 2


@pytest.mark.exhaustive
def test_an_analysis_is_the_same_over_shards(tmp_path: Path) -> None:
    check_analysis("qwen3_next", LINEARS, 2 * 3 + 2, tmp_path)
