"""Greedy and beam search against transformers' generate, with transformers' own model behind both."""

from dataclasses import replace

import pytest
import torch
from generation_judge import (
    GREEDY,
    PAPER,
    choose_end_tokens,
    draw_prompts,
    generate_with_transformers,
)
from hf_toy import build_hf_model
from tiers import few_of
from transformers import GPT2LMHeadModel

from lora_dist.generation.batches import PromptBatch, compute_mask, compute_positions, pad_left, plan_batches
from lora_dist.generation.decode import Choice, Search, decode
from lora_dist.generation_config import GenerationConfig
from lora_dist.mcore.generate import build_search

CPU = torch.device("cpu")


class WholeModel:
    """`IncrementalModel` that keeps tokens instead of keys and values, and runs all of them again each time."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model

    def prefill(self, batch: PromptBatch) -> torch.Tensor:
        self.tokens, self.num_padding = batch.tokens_BS, batch.num_padding_B
        return self.run()

    def agree(self, search: Search, logits_RV: torch.Tensor | None) -> Choice:
        assert logits_RV is not None
        return search.choose(logits_RV)

    def step(self, choice: Choice) -> torch.Tensor:
        self.tokens = torch.cat([self.tokens[choice.source_R], choice.tokens_R[:, None]], 1)
        self.num_padding = self.num_padding[choice.source_R]
        return self.run()

    def run(self) -> torch.Tensor:
        length = self.tokens.shape[1]
        positions = compute_positions(self.num_padding, 0, length)
        allowed = compute_mask(self.num_padding, 0, length)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return self.model(input_ids=self.tokens, position_ids=positions, attention_mask=mask).logits[:, -1]


def generate(
    model: GPT2LMHeadModel, prompts: list[list[int]], config: GenerationConfig, end_tokens: list[int]
) -> list[list[int]]:
    results = {}
    lengths = [len(prompt) for prompt in prompts]
    for rows in plan_batches(lengths, batch_size=config.batch_size, dp_size=1, dp_rank=0):
        batch = pad_left(prompts, rows, (), CPU)
        search = build_search(config, batch, end_tokens)
        decode(WholeModel(model), search, batch)
        results.update(zip(rows, search.results(), strict=True))
    return [results[row] for row in range(len(prompts))]


SEARCHES = [
    GREEDY,
    replace(GREEDY, no_repeat_ngram_size=2),
    PAPER,
    replace(PAPER, num_beams=3, length_penalty=-0.1, no_repeat_ngram_size=0),
    replace(PAPER, num_beams=4, length_penalty=2.0, no_repeat_ngram_size=2),
    replace(PAPER, num_beams=4, early_stopping="when_full"),
    replace(PAPER, num_beams=4, length_penalty=1.5, early_stopping="exhaustive"),
    replace(PAPER, num_beams=2, length_penalty=0.0, batch_size=1),
]


@pytest.mark.parametrize(
    "config", few_of(SEARCHES, *SEARCHES[::3]), ids=lambda c: f"{c.num_beams}-{c.length_penalty}-{c.early_stopping}"
)
def test_every_token_is_that_of_transformers(config: GenerationConfig) -> None:
    for seed, num_end_tokens in ((0, 1), (1, 3)):
        model = build_hf_model(seed)
        end_tokens = choose_end_tokens(model, num_end_tokens)
        expected = generate_with_transformers(model, draw_prompts(), config, end_tokens)
        assert generate(model, draw_prompts(), config, end_tokens) == expected


def test_rows_of_a_batch_end_at_different_lengths_and_settings_matter() -> None:
    """What the comparison above must not miss: early ends, and results that depend on each setting."""
    model = build_hf_model(0)
    end_tokens = choose_end_tokens(model)
    results = {str(config): generate(model, draw_prompts(), config, end_tokens) for config in SEARCHES}
    lengths = {len(row) for rows in results.values() for row in rows}
    assert min(lengths) < GREEDY.max_new_tokens == max(lengths)
    assert len({str(rows) for rows in results.values()}) >= 4
