"""Generation of every family over shards: token for token what transformers generates, with rotary positions too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from family_models import ONE_EACH
from family_toy import build_family_model, read_family_config, write_family_checkpoint
from generation_judge import GREEDY, PAPER, choose_end_tokens, draw_prompts, generate_with_transformers
from hf_toy import build_shard, count_processes, draw_tokens
from processes import run_distributed
from tiers import exhaustive, few_of

from lora_dist.generation.batches import pad_left
from lora_dist.generation_config import GenerationConfig
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.incremental import compute_cache_bytes, open_incremental

PAPER_BEAMS = replace(PAPER, num_beams=4)
TOPOLOGIES = [{"tp_size": 2, "pp_size": 2}, {"tp_size": 4}, {}]


def generate(options: dict, base: Path, config: GenerationConfig, end_tokens: list[int]) -> list[list[int]]:
    """Prompts of different lengths in one batch, padded on the left."""
    gpt = build_shard(options, read_family_config(base))
    load_hf_checkpoint(gpt, base)
    rows = generate_rows(gpt.requires_grad_(False), draw_prompts(), config, end_tokens=end_tokens)
    dist.barrier()
    return rows


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *few_of(
            ((name, GREEDY) for name in ONE_EACH),
            *((name, GREEDY) for name in ("llama", "deepseek_v3", "glm_moe_dsa", "gpt_oss")),
        ),
        ("llama", PAPER_BEAMS),
        *exhaustive(("qwen3_next", PAPER_BEAMS)),
    ],
    ids=[*ONE_EACH, "llama-beam", "qwen3_next-beam"],
)
def test_every_token_is_that_of_transformers(name: str, config: GenerationConfig, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    model = build_family_model(name)
    end_tokens = choose_end_tokens(model)
    expected = generate_with_transformers(model, draw_prompts(), config, end_tokens)
    assert len({tuple(row) for row in expected}) > 1
    for options in TOPOLOGIES if name == "llama" else TOPOLOGIES[:1]:
        for rows in run_distributed(generate, count_processes(options), options, tmp_path, config, end_tokens):
            assert rows == expected


def weigh_cache(base: Path) -> tuple[int, int]:
    """Bytes kept of the keys and values of 2 rows of 12 tokens, and planned."""
    gpt, tokens_BS = build_shard({"tp_size": 2}, read_family_config(base)), draw_tokens()[:, :12]
    load_hf_checkpoint(gpt, base)
    batch = pad_left(tokens_BS.tolist(), range(2), (), torch.device("cpu"))
    with torch.no_grad(), open_incremental(gpt, num_rows=2, num_columns=12) as model:
        model.prefill(batch)
        kept = sum(module.cache.num_bytes for module in gpt.modules() if getattr(module, "cache", None) is not None)
    dist.barrier()
    return kept, compute_cache_bytes(gpt, num_rows=2, num_columns=12)


def test_latents_are_kept_whole_on_every_rank(tmp_path: Path) -> None:
    model = write_family_checkpoint("deepseek_v3", tmp_path)
    per_token = model.kv_latent_size + model.rotary_size
    assert per_token < (model.query_size + model.context_size) // 2
    for kept, planned in run_distributed(weigh_cache, 2, tmp_path):
        assert kept == planned == model.num_layers * 2 * 12 * per_token * 4


def test_the_cache_holds_the_shared_heads_once(tmp_path: Path) -> None:
    model = write_family_checkpoint("llama", tmp_path)
    assert model.kv_size < model.query_size
    for kept, planned in run_distributed(weigh_cache, 2, tmp_path):
        assert kept == planned == 2 * model.num_layers * 2 * 12 * model.kv_size * 4 // 2


def test_a_delta_nets_state_does_not_grow(tmp_path: Path) -> None:
    model = write_family_checkpoint("qwen3_next", tmp_path)
    sizes, num_full = model.delta_sizes, len(model.full_attention_layers)
    state = sizes.value_heads * sizes.key_size * sizes.value_size
    tails = (sizes.kernel_size - 1) * sizes.key_heads * sizes.convolved_per_key
    in_full = 2 * 12 * model.kv_size
    expected = 2 * 4 // 2 * (num_full * in_full + (model.num_layers - num_full) * (state + tails))
    for kept, planned in run_distributed(weigh_cache, 2, tmp_path):
        assert kept == planned == expected
