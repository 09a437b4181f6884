"""What transformers' own generate makes of the toy model, and prompts of different lengths for it."""

import torch
from hf_toy import VOCAB_SIZE
from transformers import GPT2LMHeadModel

from lora_dist.generation_config import GenerationConfig

MAX_NEW_TOKENS = 18
EARLY_STOPPING = {"heuristic": False, "when_full": True, "exhaustive": "never"}
GREEDY = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
PAPER = GenerationConfig(
    max_new_tokens=MAX_NEW_TOKENS, num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4, batch_size=3
)
"""Section 5.1's decoding on E2E, appendix D.3 of the paper."""


def draw_prompts(num_prompts: int = 5) -> list[list[int]]:
    """Lengths 3, 6, 9, 12, 4, ...: no batch without padding."""
    generator = torch.Generator().manual_seed(9)
    lengths = [3 + 3 * row % 10 for row in range(num_prompts)]
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def generate_with_transformers(
    model: GPT2LMHeadModel, prompts: list[list[int]], config: GenerationConfig, end_tokens: list[int]
) -> list[list[int]]:
    """Each prompt alone, without padding; new tokens up to the first end token."""
    results = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            early_stopping=EARLY_STOPPING[config.early_stopping],
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            eos_token_id=end_tokens,
            pad_token_id=end_tokens[0],
        )
        results.append(cut_at_end(output[0, len(prompt) :].tolist(), end_tokens))
    return results


def cut_at_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0]] if ends else tokens


def choose_end_tokens(model: GPT2LMHeadModel, num_tokens: int = 1) -> list[int]:
    """Tokens that the model writes early, so that rows of a batch end at different lengths."""
    written = generate_with_transformers(model, draw_prompts(), GREEDY, [VOCAB_SIZE - 1])
    tokens = [token for row in written for token in row[3:9]]
    return sorted(set(tokens), key=lambda token: (-tokens.count(token), token))[:num_tokens]
