"""The gated delta rule in chunks: against a step for each position, against transformers', and across sequences."""

import pytest
import torch
from family_toy import StayDouble
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lora_dist.mcore.delta_rule import (
    apply_delta_rule,
    choose_chunk_size,
    convolve,
    count_active,
    cut_into_chunks,
    join_chunks,
    normalise,
)

G, R, K, V = 2, 3, 8, 5
"""Key heads, value heads that share one, features of a key and of a value."""
S, B = 150, 2
BLOCKS = ((70, 1, 79), (150,))
WHOLE = ((S,), (S,))


def draw(*sizes: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_inputs(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """By position [S, B, ...]; decays from next to none to all, `scale` times as fast."""
    return {
        "query": normalise(draw(S, B, G, K, seed=1)),
        "key": normalise(draw(S, B, G, K, seed=2)),
        "value": draw(S, B, G, R, V, seed=3),
        "log_decay": -scale * (3 * draw(S, B, G, R, seed=4)).exp(),
        "strength": draw(S, B, G, R, seed=5).sigmoid(),
    }


def run_in_chunks(
    inputs: dict[str, torch.Tensor], row_blocks: tuple | None, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [S, B, G, R, V] and the last state."""
    length, num_rows = inputs["query"].shape[:2]
    chunks = {
        name: cut_into_chunks(value.flatten(2), row_blocks).unflatten(-1, value.shape[2:])
        for name, value in inputs.items()
    }
    read, state = apply_delta_rule(
        *(chunks[name].transpose(1, 2) for name in ("query", "key")),
        chunks["value"].permute(0, 2, 3, 1, 4),
        *(chunks[name].permute(0, 2, 3, 1) for name in ("log_decay", "strength")),
        count_active(num_rows, length, row_blocks),
        state_PGRKV=state,
        keeps_state=True,
    )
    flat = read.permute(0, 3, 1, 2, 4).flatten(2)
    return join_chunks(flat, num_rows, length, row_blocks).unflatten(-1, (G, R, V)), state


def run_step_by_step(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows [S, rows, ...] from an empty state: equation 10 of arXiv:2412.06464 as it stands, a read after each."""
    length, num_rows = inputs["query"].shape[:2]
    state, outputs = inputs["value"].new_zeros(num_rows, G, R, K, V), []
    for t in range(length):
        query, key, value = inputs["query"][t] / K**0.5, inputs["key"][t], inputs["value"][t]
        state = state * inputs["log_decay"][t].exp()[..., None, None]
        known = torch.einsum("bgk,bgrkv->bgrv", key, state)
        correction = inputs["strength"][t][..., None] * (value - known)
        state = state + torch.einsum("bgk,bgrv->bgrkv", key, correction)
        outputs.append(torch.einsum("bgk,bgrkv->bgrv", query, state))
    return torch.stack(outputs), state


def run_blocks_step_by_step(inputs: dict[str, torch.Tensor], row_blocks: tuple) -> torch.Tensor:
    rows = []
    for row, blocks in enumerate(row_blocks):
        parts = {name: value[:, row : row + 1].split(blocks) for name, value in inputs.items()}
        alone = [{name: part[number] for name, part in parts.items()} for number in range(len(blocks))]
        rows.append(torch.cat([run_step_by_step(one)[0] for one in alone]))
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0], ids=["decays", "hardly forgets", "forgets all"])
@pytest.mark.parametrize("row_blocks", [None, WHOLE, BLOCKS], ids=["rows", "whole", "packed"])
def test_outputs_and_gradients_are_those_of_a_step_a_position(row_blocks: tuple | None, scale: float) -> None:
    inputs = {name: value.requires_grad_() for name, value in draw_inputs(scale).items()}
    doutput = draw(S, B, G, R, V, seed=6)
    expected = run_blocks_step_by_step(inputs, row_blocks or WHOLE)
    actual, _ = run_in_chunks(inputs, row_blocks)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, list(inputs.values()), doutput)
    found = torch.autograd.grad(actual, list(inputs.values()), doutput)
    for name, one, other in zip(inputs, found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-11 * max(1.0, other.abs().max().item()), name


def test_it_is_transformers() -> None:
    inputs = draw_inputs()
    by_row = {name: value.transpose(0, 1).requires_grad_() for name, value in inputs.items()}
    with StayDouble():
        expected, _ = torch_chunk_gated_delta_rule(
            *(by_row[name].repeat_interleave(R, dim=2) for name in ("query", "key")),
            by_row["value"].flatten(2, 3),
            g=by_row["log_decay"].flatten(2),
            beta=by_row["strength"].flatten(2),
        )
    actual, _ = run_in_chunks(inputs, None)
    torch.testing.assert_close(actual.transpose(0, 1).flatten(2, 3), expected, rtol=0, atol=1e-10)


def test_a_sequence_goes_on_where_its_state_was_left() -> None:
    inputs = draw_inputs()
    expected, last = run_step_by_step(inputs)
    state, outputs = None, []
    for first, end in ((0, 64), (64, 65), (65, 66), (66, S)):  # the last state is that of whole chunks alone
        part = {name: value[first:end] for name, value in inputs.items()}
        size = choose_chunk_size(end - first)
        filled = {name: pad_to_chunks(value, size) for name, value in part.items()}
        output, state = run_in_chunks(filled, None, state)
        outputs.append(output[: end - first])
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def pad_to_chunks(value: torch.Tensor, size: int) -> torch.Tensor:
    """Nothing is written or forgotten there: a strength and a log decay of zero."""
    return torch.cat([value, value.new_zeros(-len(value) % size, *value.shape[1:])])


def test_fp32_is_near_fp64_whatever_the_decays() -> None:
    for scale in (1e-3, 1.0, 30.0):
        inputs = draw_inputs(scale)
        exact, _ = run_in_chunks(inputs, None)
        single, _ = run_in_chunks({name: value.float() for name, value in inputs.items()}, None)
        assert single.isfinite().all()
        assert (single - exact).abs().max() < 1e-5


@pytest.mark.parametrize("num_positions", [4, 1])
@pytest.mark.parametrize("row_blocks", [None, BLOCKS], ids=["rows", "packed"])
def test_the_convolution_is_torchs_of_each_example(row_blocks: tuple | None, num_positions: int) -> None:
    x_SBX, kernels = draw(S, B, 6, seed=7).requires_grad_(), draw(6, num_positions, seed=8).requires_grad_()
    chunks = cut_into_chunks(x_SBX, row_blocks)
    convolved = convolve(chunks, kernels, count_active(B, S, row_blocks), None)
    actual, rows = join_chunks(convolved, B, S, row_blocks), []
    for row, blocks in enumerate(row_blocks or WHOLE):
        parts = [one.t()[None] for one in x_SBX[:, row].split(blocks)]
        options = {"padding": num_positions - 1, "groups": 6}
        whole = [torch.nn.functional.conv1d(one, kernels[:, None], **options)[0] for one in parts]
        rows.append(torch.cat([one[:, :length].t() for one, length in zip(whole, blocks, strict=True)]))
    expected, doutput = torch.stack(rows, dim=1), draw(S, B, 6, seed=10)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (x_SBX, kernels), doutput)
    for one, other in zip(torch.autograd.grad(actual, (x_SBX, kernels), doutput), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_convolution_goes_on_after_what_was_before() -> None:
    x_SBX, kernels = draw(S, B, 6, seed=7), draw(6, 4, seed=8)
    whole = join_chunks(convolve(cut_into_chunks(x_SBX, None), kernels, count_active(B, S, None), None), B, S, None)
    tails = x_SBX[60:63].transpose(0, 1)
    rest = convolve(cut_into_chunks(x_SBX[63:], None), kernels, count_active(B, S - 63, None), tails)
    torch.testing.assert_close(join_chunks(rest, B, S - 63, None), whole[63:])


@pytest.mark.parametrize("row_blocks", [None, WHOLE, BLOCKS, ((3, 147), (64, 86))])
def test_chunks_are_joined_again(row_blocks: tuple | None) -> None:
    x_SBX = draw(S, B, 2, seed=9)
    assert torch.equal(join_chunks(cut_into_chunks(x_SBX, row_blocks), B, S, row_blocks), x_SBX)
