"""Layers that see a sliding window, tile by tile, against a mask over whole rows: outputs and gradients, packed rows,
shared heads, sinks; what is computed and what is kept.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_toy import A, D, build_core, count_saved_bytes, draw, run

from lora_dist.batch import RowBlocks, number_blocks
from lora_dist.mcore import direct_attention
from lora_dist.mcore.attention import (
    SdpaAttention,
    SinkAttention,
    WindowedBlocks,
    compute_attention_bias,
    compute_window_mask,
    compute_windowed_blocks,
)
from lora_dist.mcore.kernels import ON_CPU
from lora_dist.mcore.window import Tiles, find_tile_size
from lora_dist.measure.flops import count_flops
from lora_dist.plan.attention import PlannedAttention

S = 70
PACKED = ((5, 65), (30, 1, 30, 9))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model's parameters are put, as `use_cpu_stand_ins` says in a process that trains."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def build_masks(
    blocks: RowBlocks | None, window: int, dtype: torch.dtype = torch.float64, seq_len: int = S
) -> tuple[Tiles, torch.Tensor]:
    """Of rows that are alike where there are no blocks."""
    block_ids = torch.zeros(1, seq_len, dtype=torch.int64) if blocks is None else number_blocks(blocks)
    tiles = compute_window_mask(block_ids, dtype, window)
    assert isinstance(tiles, Tiles)
    return tiles, compute_attention_bias(block_ids, dtype, window)


def assert_tiles_are_what_the_mask_leaves(
    core: SdpaAttention, masks: tuple[Tiles, torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    for mine, masked in zip(*(run(core, mask, inputs) for mask in masks), strict=True):
        torch.testing.assert_close(mine, masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SdpaAttention, SinkAttention])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("blocks", [None, PACKED, PACKED[1:]], ids=str)
@pytest.mark.parametrize("window", [1, 8, 9, 29, 32])
def test_output_and_gradients(
    window: int, blocks: RowBlocks | None, num_kv_heads: int, kind: type[SdpaAttention]
) -> None:
    inputs = draw((S, len(blocks or PACKED)), num_kv_heads)
    assert_tiles_are_what_the_mask_leaves(build_core(kind), build_masks(blocks, window), inputs)


@pytest.mark.parametrize("kind", [SdpaAttention, SinkAttention])
def test_blocks_longer_than_the_window(kind: type[SdpaAttention]) -> None:
    """Each by itself: causal, under a mask, or tile by tile."""
    inputs, core, row_blocks = draw((S, 2), 2), build_core(kind), ((5, 65), (30, 1, 30, 9))
    blocks = compute_windowed_blocks(row_blocks, torch.float64, 8, torch.device("cpu"))
    assert isinstance(blocks, WindowedBlocks)
    assert {length: isinstance(mask, Tiles) for length, mask in blocks.masks.items()} == {65: True, 30: True, 9: False}
    bias = compute_attention_bias(number_blocks(row_blocks), torch.float64, 8)
    for mine, masked in zip(*(run(core, mask, inputs) for mask in (blocks, bias)), strict=True):
        torch.testing.assert_close(mine, masked, rtol=1e-12, atol=1e-12)
    assert compute_windowed_blocks(row_blocks, torch.float64, 65, torch.device("cpu")) == row_blocks


def test_rows_of_whole_tiles() -> None:
    assert_tiles_are_what_the_mask_leaves(build_core(), build_masks(None, 16, seq_len=72), draw((72, 2), 2))


@pytest.mark.parametrize("features", [(8, 4), (12, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("kind", [SdpaAttention, SinkAttention])
def test_features_that_no_kernel_takes(features: tuple[int, int], kind: type[SdpaAttention]) -> None:
    inputs, masks = draw((S, 2), 2, features=features), build_masks(PACKED, 9)
    core = build_core(kind)
    mine = run(core, masks[0], inputs)
    inputs[2] = torch.nn.functional.pad(inputs[2], (0, features[0] - features[1]))
    masked = core(*inputs, masks[1]).unflatten(-1, (A, -1))[..., : features[1]].flatten(2)
    torch.testing.assert_close(mine[0], masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SdpaAttention, SinkAttention])
def test_a_kernel_without_shared_heads(kind: type[SdpaAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is handed, keys and values are kept as they come."""
    inputs, core = draw((S, 2), 2), build_core(kind)
    masks = [build_masks(blocks, 9)[0] for blocks in (None, PACKED)]
    shared = [(run(core, mask, inputs), count_saved_bytes(core, mask, inputs)) for mask in masks]
    monkeypatch.setattr(direct_attention, "choose_kernel", lambda *_: replace(ON_CPU, takes_shared_heads=False))
    for mask, (expected, num_bytes) in zip(masks, shared, strict=True):
        torch.testing.assert_close(run(core, mask, inputs), expected, rtol=1e-12, atol=1e-12)
        assert count_saved_bytes(core, mask, inputs) == num_bytes


@pytest.mark.parametrize("blocks", [None, PACKED], ids=str)
def test_the_output_goes_back_as_kernels_lay_it_out(blocks: RowBlocks | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position by position, all heads of each: the memory-efficient kernel's backward reads no other strides."""
    seen = []

    def run_backward(*args: Any) -> Any:
        seen.append(args[4][0])
        return ON_CPU.run_backward(*args)

    monkeypatch.setattr(direct_attention, "choose_kernel", lambda *_: replace(ON_CPU, run_backward=run_backward))
    run(build_core(), build_masks(blocks, 9)[0], draw((S, 2), 2))
    [output] = seen
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [None, PACKED], ids=str)
def test_nothing_more_is_kept_than_under_a_mask(blocks: RowBlocks | None, dtype: torch.dtype) -> None:
    """But for the logarithms of what fills up the last tile."""
    inputs, core = draw((S, 2), 1, dtype), build_core(dtype=dtype)
    tiles, bias = build_masks(blocks, 16, dtype)
    kept, masked = (count_saved_bytes(core, mask, inputs) for mask in (tiles, bias))
    num_filled_up = -S % tiles.bias.shape[2]
    assert kept - tiles.bias.untyped_storage().nbytes() - 4 * num_filled_up * 2 * A == (
        masked - bias.untyped_storage().nbytes()
    )
    assert tiles.bias.numel() == (len(blocks) if blocks else 1) * (S + num_filled_up) * 24


def test_a_position_costs_the_window_and_a_tile() -> None:
    inputs, core = draw((S, 2), 2), build_core()
    tiles, bias = build_masks(None, 16)

    def count(mask: torch.Tensor | Tiles) -> int:
        with count_flops() as counter:
            core(*inputs, mask).sum().backward()
        return counter.get_total_flops()

    assert count(tiles) * S**2 == count(bias) * 72 * (16 + 8)


@pytest.mark.parametrize(
    ("window", "seq_len", "size"),
    [
        *((128, 8192, 64), (512, 8192, 256), (1024, 4096, 512), (4096, 32768, 2048), (2047, 4096, 1024)),
        *((128, 192, None), (128, 200, None), (128, 256, 64), (4096, 8192, 2048), (4096, 6144, None)),
        *((5, 16, None), (5, 24, 8), (1, 9, None), (1, 24, 8)),
    ],
)
def test_tiles_are_less_work_or_are_not_made(window: int, seq_len: int, size: int | None) -> None:
    assert find_tile_size(window, seq_len) == size


def test_whole_rows_draw_dropout() -> None:
    mask = compute_window_mask(torch.zeros(1, S, dtype=torch.int64), torch.float64, 8, drops=True)
    assert isinstance(mask, torch.Tensor)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("core", [SdpaAttention, SinkAttention])
def test_what_planned_hardware_runs(core: type[SdpaAttention], kind: str) -> None:
    """One kernel for all tiles, which takes a bias."""
    hardware = SimpleNamespace(kind=kind, compute_capability=9.0)
    attention = build_core(core, torch.bfloat16).to("meta")
    tiles = Tiles(build_masks(PACKED, 16, torch.bfloat16)[0].bias.to("meta"))
    inputs = [one.detach().to("meta").requires_grad_() for one in draw((S, 2), 2, torch.bfloat16)]
    with PlannedAttention(hardware), torch.profiler.profile() as profile:
        output = attention(*inputs, tiles)
    output.sum().backward()
    assert output.shape == (S, 2, A * D)
    assert [one.grad.shape for one in inputs] == [one.shape for one in inputs]
    called = [event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key]
    wanted = {"cpu": "flash_attention_for_cpu", "gpu": "efficient_attention"}[kind]
    assert called == [f"aten::_scaled_dot_product_{wanted}"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("core", [SdpaAttention, SinkAttention])
@pytest.mark.parametrize("blocks", [None, PACKED], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=str)
def test_on_a_gpu(dtype: torch.dtype, tolerance: float, blocks: RowBlocks | None, core: type[SdpaAttention]) -> None:
    """The memory-efficient kernel, as far from the mask in fp64 as its dtype lets it be."""
    inputs, attention = draw((S, 2), 2), build_core(core)
    expected = run(attention, build_masks(blocks, 9)[1], inputs)
    there = [one.detach().to("cuda", dtype).requires_grad_() for one in inputs]
    tiles = Tiles(build_masks(blocks, 9, dtype)[0].bias.to("cuda"))
    for mine, wanted in zip(run(attention.to("cuda", dtype), tiles, there), expected, strict=True):
        error = (mine.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance
