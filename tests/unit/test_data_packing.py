"""Rows: every example once and whole, labels within their example, losses as if each example stood alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from lora_dist.batch import Batch, number_blocks
from lora_dist.data.collate import collate_rows
from lora_dist.data.examples import Examples
from lora_dist.data.packing import Layout, build_layout, shuffle_layout
from lora_dist.mcore.attention import compute_attention_bias

VOCAB_SIZE, SEQ_LEN = 50, 24


def draw_examples(seed: int, num_examples: int = 40, longest: int = SEQ_LEN) -> Examples:
    """Examples of 1 to `longest` positions; tokens start at 1, so that 0 is padding."""
    generator = np.random.default_rng(seed)
    num_positions = generator.integers(1, longest + 1, num_examples)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(num_positions + 1)])
    is_learnt = generator.integers(0, 2, starts[-1]).astype(np.bool_)
    is_learnt[starts[:-1]], is_learnt[starts[1:] - 1] = False, True
    return Examples(
        tokens=generator.integers(1, VOCAB_SIZE, starts[-1]).astype(np.int32), starts=starts, is_learnt=is_learnt
    )


def get_rows(layout: Layout) -> list[NDArray[np.int64]]:
    return [layout.get_row(visit) for visit in range(layout.num_rows)]


def collate(examples: Examples, rows: list[NDArray[np.int64]], *, packed: bool = True) -> Batch:
    return collate_rows(
        examples, rows, seq_len=SEQ_LEN, packed=packed, row_ids=range(len(rows)), num_loss_tokens=0, num_tokens=0
    )


@pytest.mark.parametrize("collate", ["pack", "pad"])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_in_every_epoch(seed: int, collate: str) -> None:
    lengths = draw_examples(seed).num_positions
    base = build_layout(lengths, seq_len=SEQ_LEN, collate=collate)
    for layout in (base, *(shuffle_layout(base, lengths, seed=seed, epoch=epoch) for epoch in range(3))):
        rows = get_rows(layout)
        assert sorted(np.concatenate(rows)) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= SEQ_LEN for row in rows)
        assert len(rows) == base.num_rows
        if collate == "pad":
            assert {len(row) for row in rows} == {1}


def test_epochs_differ_and_repeat_themselves() -> None:
    """Also the neighbours within a row change, not the rows' order alone."""
    lengths = np.tile(np.arange(3, 9), 40)
    base = build_layout(lengths, seq_len=SEQ_LEN, collate="pack")

    def neighbours(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [tuple(row) for row in get_rows(shuffle_layout(base, lengths, seed=seed, epoch=epoch))]

    assert neighbours(0, 1) == neighbours(0, 1)
    for other in (neighbours(0, 2), neighbours(1, 1)):
        assert len(set(neighbours(0, 1)) & set(other)) < base.num_rows / 10


def test_little_padding() -> None:
    """Long rows of short examples are full but for the last; best fit finds 7+3 and 6+4."""
    lengths = np.random.default_rng(0).integers(20, 90, 3000)
    layout = build_layout(lengths, seq_len=512, collate="pack")
    assert layout.num_rows <= np.ceil(lengths.sum() / 512 * 1.01)
    pairs = build_layout(np.array([7, 6, 4, 3]), seq_len=10, collate="pack")
    assert sorted(tuple(row) for row in get_rows(pairs)) == [(0, 3), (1, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_packed_tensors(seed: int) -> None:
    """Token by token against the examples: positions, blocks, labels and their mask, padding."""
    examples = draw_examples(seed)
    rows = get_rows(build_layout(examples.num_positions, seq_len=SEQ_LEN, collate="pack"))
    batch = collate(examples, rows)
    assert batch.row_blocks is not None
    for index, row in enumerate(rows):
        first = 0
        for example in row:
            whole = slice(examples.starts[example], examples.starts[example + 1])
            tokens, learnt = (torch.from_numpy(array[whole]) for array in (examples.tokens, examples.is_learnt))
            tokens, learnt, length = tokens.long(), learnt[1:], len(tokens) - 1
            here = slice(first, first + length)
            assert batch.input_ids_BS[index, here].equal(tokens[:-1])
            assert batch.loss_mask_BS[index, here].equal(learnt)
            assert batch.labels_BS[index, here].equal(torch.where(learnt, tokens[1:], 0))
            assert batch.position_ids_BS[index, here].equal(torch.arange(length))
            first += length
        for padding in (batch.input_ids_BS, batch.labels_BS, batch.loss_mask_BS):
            assert not padding[index, first:].any()
        lengths = examples.num_positions[row].tolist()
        assert batch.row_blocks[index] == tuple([*lengths, SEQ_LEN - first] if first < SEQ_LEN else lengths)
    assert int(batch.loss_mask_BS.sum()) == examples.num_loss_tokens.sum()
    assert batch.row_ids_B.tolist() == list(range(len(rows)))


def test_padded_tensors() -> None:
    """One example a row from its start; a row without an example is padding and learns nothing."""
    examples = draw_examples(0, num_examples=3)
    batch = collate(examples, [np.array([2]), np.zeros(0, dtype=np.int64)], packed=False)
    assert batch.row_blocks is None
    length = examples.num_positions[2]
    tokens = examples.tokens[examples.starts[2] : examples.starts[3]]
    assert batch.input_ids_BS[0, :length].tolist() == tokens[:-1].tolist()
    assert int(batch.loss_mask_BS[0].sum()) == examples.num_loss_tokens[2]
    assert not batch.input_ids_BS[:, length:].any()
    assert not batch.loss_mask_BS[1].any()


def compute_losses(model: GPT2LMHeadModel, batch: Batch) -> list[float]:
    """Cross-entropy of every learnt token, in the batch's order."""
    bias = None
    if batch.row_blocks is not None:
        bias = compute_attention_bias(number_blocks(batch.row_blocks), torch.float64)
    logits = model(batch.input_ids_BS, position_ids=batch.position_ids_BS, attention_mask=bias).logits
    return F.cross_entropy(logits[batch.loss_mask_BS], batch.labels_BS[batch.loss_mask_BS], reduction="none").tolist()


@torch.no_grad()
def test_packed_losses_equal_those_of_each_example_alone() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=SEQ_LEN,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    examples = draw_examples(1, num_examples=12, longest=SEQ_LEN // 2)
    rows = get_rows(build_layout(examples.num_positions, seq_len=SEQ_LEN, collate="pack"))
    assert max(map(len, rows)) >= 3
    packed = compute_losses(model, collate(examples, rows))
    alone = [
        loss
        for row in rows
        for example in row
        for loss in compute_losses(model, collate(examples, [np.array([example])], packed=False))
    ]
    assert packed == pytest.approx(alone, abs=1e-10)
    bounds_lost = collate(examples, rows)
    bounds_lost.row_blocks = ((SEQ_LEN,),) * len(rows)
    assert compute_losses(model, bounds_lost) != pytest.approx(alone, abs=1e-3)
