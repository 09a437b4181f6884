"""Packed examples attend within themselves: block by block as under a mask, and as each alone."""

import pytest
import torch
from attention_toy import build_core, draw, run

from lora_dist.batch import RowBlocks, number_blocks
from lora_dist.cli.compose import compose_config
from lora_dist.mcore.attention import compute_attention_bias
from lora_dist.measure.flops import count_flops

S = 12
ROWS = [((12,),), ((5, 7),), ((1, 4, 7), (12,)), ((3, 3, 3, 3), (11, 1), (2, 10))]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("row_blocks", ROWS)
def test_blocks_are_what_the_mask_leaves(row_blocks: RowBlocks, num_kv_heads: int) -> None:
    inputs = draw((S, len(row_blocks)), num_kv_heads)
    bias = compute_attention_bias(number_blocks(row_blocks), torch.float64)
    for mine, masked in zip(run(build_core(), row_blocks, inputs), run(build_core(), bias, inputs), strict=True):
        torch.testing.assert_close(mine, masked)


def test_a_block_is_what_it_is_alone() -> None:
    inputs, core = draw((S, 1), 2), build_core()
    output, first = core(*inputs, ((5, 7),)), core(*(whole[:5] for whole in inputs), None)
    torch.testing.assert_close(output[:5], first)
    torch.testing.assert_close(output[5:], core(*(whole[5:] for whole in inputs), None))


def test_nothing_is_computed_between_blocks() -> None:
    """FLOPs grow with the sum of the blocks' squares, those of a mask with the row's."""
    inputs = draw((S, 2), 4)

    def count(mask: torch.Tensor | RowBlocks) -> int:
        with count_flops() as counter:
            build_core()(*inputs, mask).sum().backward()
        return counter.get_total_flops()

    row_blocks = ((3, 9), (6, 6))
    masked = count(compute_attention_bias(number_blocks(row_blocks), torch.float64))
    assert count(row_blocks) * 2 * S**2 == masked * (3**2 + 9**2 + 6**2 + 6**2)


@pytest.mark.parametrize(
    ("words", "on_gpu", "blocks"),
    [
        ([], False, True),
        ([], True, False),
        (["data.seq_len=2048"], True, True),
        (["packed_attention=blocks"], True, True),
        (["packed_attention=mask", "data.seq_len=2048"], True, False),
        (["packed_attention=mask"], False, False),
        (["cuda_graphs=true", "data.seq_len=2048"], True, False),
    ],
)
def test_which_it_is(words: list[str], on_gpu: bool, blocks: bool) -> None:
    config = compose_config(["model=llama3_8b", "data=fake", "data.seq_len=1024", *words])
    assert config.attends_in_blocks(on_gpu=on_gpu) is blocks


def test_graphs_want_a_mask() -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs=true needs packed_attention=mask"):
        compose_config(["data=fake", "data.seq_len=64", "cuda_graphs=true", "packed_attention=blocks"])
