"""What is kept of a distribution, and drawn from it."""

from dataclasses import replace

import pytest
import torch

from lora_dist.config import ModelConfig, TopologyConfig
from lora_dist.generation.batches import compute_mask, compute_positions, pad_left, plan_batches
from lora_dist.generation.cache import LayerCache
from lora_dist.generation.one_path import OnePath
from lora_dist.generation.scores import NO_TOKEN, ban_repeats, keep_top_k, keep_top_p
from lora_dist.generation_config import GenerateConfig, GenerateOptions, GenerationConfig, check_room

INFINITE = float("inf")


def list_banned(history: list[list[int]], ngram_size: int, vocab_size: int = 6) -> list[list[int]]:
    scores = ban_repeats(torch.zeros(len(history), vocab_size), torch.tensor(history), ngram_size)
    return [(row == -INFINITE).nonzero()[:, 0].tolist() for row in scores]


def test_a_token_that_completes_an_ngram_of_the_row_is_banned() -> None:
    history = [[1, 2, 3, 1, 2], [1, 2, 3, 2, 1], [4, 1, 4, 2, 4]]
    assert list_banned(history, 3) == [[3], [], []]
    assert list_banned(history, 2) == [[3], [2], [1, 2]]
    assert list_banned(history, 1) == [[1, 2, 3], [1, 2, 3], [1, 2, 4]]
    assert list_banned(history, 0) == list_banned(history, 6) == [[], [], []]


def test_padding_makes_no_ngram() -> None:
    assert list_banned([[NO_TOKEN, NO_TOKEN, NO_TOKEN, 5]], 2) == [[]]
    assert list_banned([[NO_TOKEN, NO_TOKEN, NO_TOKEN, 5]], 3) == [[]]
    assert list_banned([[NO_TOKEN, NO_TOKEN, 5, 5]], 1) == [[5]]


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25], [0.9, 0.02, 0.04, 0.03, 0.01]]).log()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [[1], [0]]), (0.5, [[1, 4], [0]]), (0.84, [[1, 2, 4], [0]]), (0.92, [[0, 1, 2, 4], [0, 2]])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[list[int]]) -> None:
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in keep_top_p(LOGITS, top_p)] == kept


def test_top_k_keeps_the_largest() -> None:
    kept = keep_top_k(LOGITS, 2)
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in kept] == [[1, 4], [0, 2]]
    assert torch.equal(keep_top_k(LOGITS, 0), LOGITS)
    assert torch.equal(keep_top_p(keep_top_k(LOGITS, 9), 1.0), LOGITS)


def draw(config: GenerationConfig, row_ids: range) -> torch.Tensor:
    """[B, T]; what is drawn from one distribution again and again."""
    batch = pad_left([[0]] * len(row_ids), range(len(row_ids)), (), torch.device("cpu"))
    search = OnePath(config, replace(batch, row_ids=tuple(row_ids)), [])
    for _ in range(config.max_new_tokens):
        search.choose(LOGITS[:1].expand(len(row_ids), -1))
    return torch.tensor(search.results())


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.05, 0.25]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.04, 0.0025, 0.0625]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0, 0.25]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 0.4, 0.2, 0, 0.25]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.6}, [0, 0.4**0.5, 0, 0, 0.5]),
    ],
)
def test_frequencies_are_the_probabilities(options: dict[str, float], weights: list[float]) -> None:
    config = GenerationConfig(max_new_tokens=1000, **options)  # type: ignore[arg-type]
    drawn = draw(config, range(40))
    frequencies = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    expected = torch.tensor(weights) / sum(weights)
    assert (frequencies[expected == 0] == 0).all()
    assert (frequencies - expected).abs().max() < 4 * 0.5 / drawn.numel() ** 0.5  # four standard deviations


@pytest.mark.parametrize(("in_context", "expected"), [(True, [4, 1, 2, 1]), (False, [1, 1, 4, 1])])
def test_the_contexts_ngrams_count_or_not(in_context: bool, expected: list[int]) -> None:
    """Tokens by likelihood 1, 4, 2, 3, 0, after the context 1, 1: nothing follows another twice."""
    config = GenerationConfig(max_new_tokens=4, no_repeat_ngram_size=2, ngrams_in_context=in_context)
    search = OnePath(config, pad_left([[1, 1], [0, 3, 1]], [0, 1], (), torch.device("cpu")), [])
    for _ in range(4):
        search.choose(LOGITS[0, [3, 1, 2, 0, 4]].expand(2, -1))
    assert search.results()[0] == expected


def test_draws_depend_on_seed_and_row_alone() -> None:
    config = GenerationConfig(max_new_tokens=30, temperature=1.0)
    whole = draw(config, range(6))
    assert torch.equal(whole[2:4], draw(config, range(2, 4)))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, draw(replace(config, seed=1), range(6)))


def test_batches_are_dealt_out_and_padding_is_out_of_sight() -> None:
    lengths = [3, 9, 4, 9, 2]
    dealt = [plan_batches(lengths, batch_size=2, dp_size=2, dp_rank=replica) for replica in range(2)]
    assert dealt == [[[1, 3], [4]], [[2, 0]]]
    batch = pad_left([[7, 8, 9], [5]], [0, 1], (None, 0), torch.device("cpu"))
    assert batch.tokens_BS.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch.adapter_of_row == (None, 0)
    assert compute_positions(batch.num_padding_B, 0, 3).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert compute_positions(batch.num_padding_B, 3, 1).tolist() == [[3], [1]]
    assert compute_mask(batch.num_padding_B, 3, 1)[1, 0].tolist() == [[False, False, True, True]]
    assert compute_mask(batch.num_padding_B, 0, 3)[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_cache_gives_back_what_was_kept_in_the_order_asked_for() -> None:
    keys, values = torch.randn(2, 2, 3, 4, 5).unbind()
    cache = LayerCache(num_rows=6, num_columns=4)
    assert cache.num_bytes == 0
    cache.append(keys[:, :, :2], values[:, :, :2])
    source = torch.tensor([1, 1, 0, 0, 1])
    cache.select(source)
    new = torch.randn(5, 3, 1, 5)
    key, value = cache.append(new, -new)
    assert torch.equal(key, torch.cat([keys[source][:, :, :2], new], 2))
    assert torch.equal(value, torch.cat([values[source][:, :, :2], -new], 2))
    assert cache.num_bytes == 2 * 6 * 3 * 4 * 5 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "generate.num_beams=0 must be at least 1"),
        ({"top_p": 0.0, "temperature": 1.0}, r"generate.top_p=0.0 must lie in \(0, 1\]"),
        ({"temperature": -1.0}, "generate.temperature=-1.0 must not be negative"),
        ({"temperature": 1.0, "num_beams": 2}, "set temperature=0 or num_beams=1"),
        ({"top_k": 5}, "generate.top_k=5 has no effect without drawing"),
        ({"early_stopping": "no"}, "generate.early_stopping='no' is not one of heuristic, when_full, exhaustive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


SIZES = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}


def test_rows_without_room_are_refused_with_both_numbers() -> None:
    model = ModelConfig(name="toy", max_position_embeddings=32, **SIZES)
    check_room([4, 6], 26, model)
    with pytest.raises(ValueError, match=r"context 2 has 7 tokens, .*max_new_tokens=26 33, but .*embeddings=32.* 25"):
        check_room([4, 7], 26, model)
    with pytest.raises(ValueError, match=r"context 1 has 32 tokens, .*embeddings=32; shorten the context$"):
        check_room([32], 1, model)
    with pytest.raises(ValueError, match="context 1 has no token"):
        check_room([0], 1, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "a", "adapters": ["b"]}, "adapter and adapters are both set"),
        ({"generate": GenerateOptions(prompt="x", input="y")}, "give generate.input=FILE or generate.prompt"),
        ({"generate": GenerateOptions(prompt="x", merge=True)}, "generate.merge=true merges one adapter"),
        (
            {"generate": GenerateOptions(prompt="x", max_new_tokens=80)},
            r"max_new_tokens=80 leaves no room for a context in .*embeddings=80; shorten it to 79 or less",
        ),
        ({"topology": TopologyConfig(tp_size=2, sequence_parallel=True)}, "topology.sequence_parallel=true"),
    ],
)
def test_a_verb_that_cannot_run_is_refused(changes: dict, message: str) -> None:
    model = ModelConfig(name="toy", max_position_embeddings=80, **SIZES)
    given = {"model": model, "topology": TopologyConfig(), "generate": GenerateOptions(prompt="x")}
    GenerateConfig(**given)
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**given | changes)
