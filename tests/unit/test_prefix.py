"""Slots of trained vectors: where they stand in examples, prompts and batches, and how many parameters they make."""

import numpy as np
import pytest
import torch
from data_files import tiny_tokenizer

from lora_dist.batch import number_blocks
from lora_dist.cli.compose import compose_config
from lora_dist.data.collate import collate_rows
from lora_dist.data.contexts import encode_contexts
from lora_dist.data.examples import Examples, draw_fake_examples, encode_pairs
from lora_dist.data.rows import BadRows, Pair
from lora_dist.generation.scores import ban_repeats
from lora_dist.methods.count import count_trainable
from lora_dist.prefix.layer import PrefixVectors
from lora_dist.prefix.slots import list_slots, split_slots
from lora_dist.prefix.spec import PrefixSpec, build_prefix_specs
from lora_dist.prefix_config import PrefixConfig

END = int(tiny_tokenizer().eos_token_id)
SLOTS = PrefixConfig(num_prefix=3, num_infix=2)
PAIRS = [Pair(1, "name : Q", "The Mill"), Pair(2, "", "Q"), Pair(3, "name : The Vaults", "a pub")]


def encode(slots: PrefixConfig | None, seq_len: int = 40) -> tuple[Examples, BadRows]:
    bad = BadRows("f", "skip")
    return encode_pairs(PAIRS, tiny_tokenizer(), seq_len=seq_len, bad=bad, slots=slots), bad


def cut(examples: Examples) -> list[list[int]]:
    return [examples.tokens[a:b].tolist() for a, b in zip(examples.starts, examples.starts[1:], strict=False)]


def count_asked(examples: Examples) -> list[int]:
    """Of each example, the tokens before the first that is learnt."""
    return [int(examples.is_learnt[a:b].argmax()) for a, b in zip(examples.starts, examples.starts[1:], strict=False)]


def test_slots_are_tokens_of_their_own_until_a_batch_is_made() -> None:
    assert list_slots(SLOTS) == ([-2, -3, -4], [-5, -6])
    assert list_slots(None) == ([], [])
    ids, slots = split_slots(torch.tensor([-2, -4, 7, 0, -5, -6, -1]))
    assert ids.tolist() == [0, 0, 7, 0, 0, 0, 0]
    assert slots.tolist() == [1, 3, 0, 0, 4, 5, 0]


@pytest.mark.parametrize("slots", [SLOTS, PrefixConfig(num_prefix=0, num_infix=1), PrefixConfig(num_infix=0)])
def test_an_example_is_the_plain_one_with_slots_around_its_prompt(slots: PrefixConfig) -> None:
    (plain, _), (examples, _) = encode(None), encode(slots)
    before_context, before_target = list_slots(slots)
    for bare, whole in zip(cut(plain), cut(examples), strict=True):
        asks = bare.index(END) + 1
        assert whole == [*before_context, *bare[:asks], *before_target, *bare[asks:]]
    assert (examples.num_loss_tokens == plain.num_loss_tokens).all()
    assert (examples.num_positions == plain.num_positions + slots.num_slots).all()
    prompts, _ = encode_contexts([pair.context for pair in PAIRS], tiny_tokenizer(), end_context=True, slots=slots)
    for prompt, whole, num_asked in zip(prompts, cut(examples), count_asked(examples), strict=True):
        assert prompt == whole[:num_asked]
    ((going_on, *_), _) = encode_contexts(["name : Q"], tiny_tokenizer(), end_context=False, slots=slots)
    assert going_on == [*before_context, *cut(plain)[0][: cut(plain)[0].index(END)]]


def test_slots_count_in_the_length_of_an_example() -> None:
    longest = int(encode(None)[0].num_positions.max())
    assert len(encode(None, longest)[0]) == len(encode(SLOTS, longest + 5)[0]) == 3
    shorter, bad = encode(SLOTS, longest + 4)
    assert len(shorter) == 2
    assert bad.counts == {"too long": 1}


@pytest.mark.parametrize("seq_len", [7, 8, 20])
def test_fake_examples_have_slots_where_examples_have_them(seq_len: int) -> None:
    examples = draw_fake_examples(5, vocab_size=11, seq_len=seq_len, seed=3, slots=SLOTS)
    for tokens, num_asked in zip(cut(examples), count_asked(examples), strict=True):
        assert tokens[:3] == [-2, -3, -4]
        assert tokens[num_asked - 2 : num_asked] == [-5, -6]
        assert sum(token < 0 for token in tokens) == 5
    assert (examples.num_loss_tokens >= 1).all()


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_looks_up_no_slot_and_learns_none(packed: bool) -> None:
    """The slot before a target predicts its first token; positions count slots, each example's from 0."""
    examples, _ = encode(SLOTS)
    plain, _ = encode(None)
    rows = [np.array([0, 2])] if packed else [np.array([0]), np.array([2])]
    options = {"seq_len": 60, "packed": packed, "row_ids": range(len(rows)), "num_loss_tokens": 1, "num_tokens": 1}
    batch, bare = collate_rows(examples, rows, **options), collate_rows(plain, rows, **options)
    assert batch.slots_BS is not None
    assert bare.slots_BS is None
    assert batch.slots_BS[batch.slots_BS > 0].tolist() == [1, 2, 3, 4, 5] * 2
    assert not batch.input_ids_BS[batch.slots_BS > 0].any()
    assert batch.labels_BS[batch.loss_mask_BS].tolist() == bare.labels_BS[bare.loss_mask_BS].tolist()
    assert batch.position_ids_BS[batch.slots_BS == 1].tolist() == [0, 0]
    first_learnt = batch.loss_mask_BS & ~batch.loss_mask_BS.roll(1, 1)
    assert batch.slots_BS[first_learnt].tolist() == [5, 5]
    assert int((batch.slots_BS[batch.loss_mask_BS] > 0).sum()) == 2
    if packed:
        assert batch.row_blocks is not None
        assert number_blocks(batch.row_blocks)[batch.slots_BS > 0].tolist() == [0] * 5 + [1] * 5


def test_an_ngram_with_a_slot_is_none() -> None:
    """`1 2` comes before a slot and again at the end: that bans no token, not the one a negative number would index."""
    scores = torch.zeros(1, 9)
    assert ban_repeats(scores, torch.tensor([[1, 2, -2, -3, 1, 2]]), 3).equal(scores)
    assert ban_repeats(scores, torch.tensor([[1, 2, 5, -3, 1, 2]]), 3)[0].isinf().nonzero().tolist() == [[5]]


def count(*overrides: str) -> int:
    return count_trainable(compose_config(list(overrides), on_paper=True))


def test_prefix_embed_of_gpt3_is_the_papers() -> None:
    assert count("model=gpt3_175b", "method=prefix_embed", "data.seq_len=512") == 12288 * (256 + 8) == 3_244_032  # 3.2M


def test_prefix_layer_of_gpt3_is_the_papers_formula() -> None:
    """The paper prints 20.2M for l_p = l_i = 8, where its formula L x d_model x (l_p + l_i) gives 18.9M."""
    assert count("model=gpt3_175b", "method=prefix_layer") == 96 * 12288 * (8 + 8) == 18_874_368


@pytest.mark.parametrize(("method", "num_levels"), [("lora_prefix_embed", 1), ("lora_prefix_layer", 96)])
def test_lora_beside_prefixes_is_the_sum(method: str, num_levels: int) -> None:
    factors = count("model=gpt3_175b", "method=lora", "lora.rank=8")
    assert factors == 37_748_736
    assert count("model=gpt3_175b", f"method={method}", "lora.rank=8") == factors + num_levels * 12288 * (8 + 4)


@pytest.mark.parametrize("method", ["prefix_embed", "prefix_layer"])
def test_the_modules_hold_what_is_counted(method: str) -> None:
    overrides = ["model=tiny", "data.seq_len=128", f"method={method}", "prefix.num_prefix=5", "prefix.num_infix=2"]
    config = compose_config(overrides)
    specs = build_prefix_specs(method, config.prefix, config.model)
    assert [spec.name for spec in specs] == ["embedding.prefix", "layers.1.prefix"][: len(specs)]
    modules = [PrefixVectors(spec, init_std=0.02, seed=0) for spec in specs]
    assert sum(p.numel() for module in modules for p in module.parameters()) == count_trainable(config)


def test_vectors_are_written_at_the_slots_alone() -> None:
    spec = PrefixSpec(layer=1, num_slots=5, hidden_size=4)
    module = PrefixVectors(spec, init_std=0.02, seed=0)
    hidden = torch.randn(3, 2, 4, dtype=torch.float64)
    slots = torch.tensor([[0, 5], [1, 0], [0, 2]])
    written = module(hidden, slots)
    assert written.dtype == torch.float64
    for row in range(3):
        for column in range(2):
            slot = int(slots[row, column])
            expected = module.vectors_NH[slot - 1].double() if slot else hidden[row, column]
            assert written[row, column].equal(expected)
    assert module.vectors_NH.std().item() == pytest.approx(0.02, rel=0.5)
    assert module.vectors_NH.equal(PrefixVectors(spec, init_std=0.02, seed=0).vectors_NH)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prefix.num_prefix=-1"], "prefix.num_prefix=-1 must not be negative"),
        (["prefix.num_infix=-1"], "prefix.num_infix=-1 must not be negative"),
        (["prefix.num_prefix=0", "prefix.num_infix=0"], "num_infix=0 train nothing; set one above 0"),
        (["prefix.init_std=0"], "prefix.init_std=0.0 must be positive"),
        (["method=prefix_embed"], "prefix.num_prefix=256 and prefix.num_infix=8 leave no room"),
        (["method=prefix_layer", "prefix.num_prefix=250"], "an example in data.seq_len=256; use fewer, or a longer"),
        (["method=lora_prefix_embed", "lora.bias=all"], "trains LoRA's factors and prefix vectors alone"),
        (["method=lora_prefix_layer", "lora.use_dora=true"], "trains LoRA's factors and prefix vectors alone"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        compose_config(overrides)
    assert message in str(refusal.value)
