"""Attention with sinks by the fused kernels against a softmax written out with one more column: outputs and gradients,
causal rows, blocks, windows, shared heads, step by step; what is kept; what a planned GPU would run.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from attention_toy import A, D, build_core, count_saved_bytes, draw, run

from lora_dist.batch import RowBlocks, number_blocks
from lora_dist.generation.batches import compute_mask
from lora_dist.generation.cache import LayerCache
from lora_dist.mcore.attention import Mask, SdpaAttention, SinkAttention, compute_attention_bias
from lora_dist.measure.flops import count_flops
from lora_dist.plan.attention import PlannedAttention

S, B = 70, 2
BLOCKS = ((5, 65), (70,))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model's parameters are put, as `use_cpu_stand_ins` says in a process that trains."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def attend_written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_A: torch.Tensor, bias):
    """[S, B, A * D] of the same layout."""
    copies = A // key.shape[2]
    key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
    scores = torch.einsum("sbad,tbad->bast", query, key) * D**-0.5 + bias
    with_sinks = torch.cat([scores, sinks_A[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bast,tbad->sbad", with_sinks.softmax(-1)[..., :-1], value).flatten(2)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("blocks", "window", "given"),
    [(None, None, "nothing"), (None, 5, "bias"), (BLOCKS, None, "blocks"), (BLOCKS, None, "bias"), (BLOCKS, 9, "bias")],
    ids=str,
)
def test_output_and_gradients(blocks: RowBlocks | None, window: int | None, given: str, num_kv_heads: int) -> None:
    inputs, core = draw((S, B), num_kv_heads), build_core(SinkAttention)
    block_ids = number_blocks(blocks or ((S,),) * B)
    bias = compute_attention_bias(block_ids, torch.float64, window)
    mask: Mask = {"nothing": None, "blocks": blocks, "bias": bias}[given]
    weights = torch.linspace(-1, 1, S * B * A * D, dtype=torch.float64).view(S, B, -1)
    expected = attend_written_out(*inputs, core.sinks, bias)
    gradients = torch.autograd.grad((expected * weights).sum(), [*inputs, core.sinks])
    computed = run(core, mask, inputs), [expected, *gradients]
    for actual, expected in zip(*computed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    without = build_core(SdpaAttention)(*inputs, mask)
    assert (without - computed[0][0]).abs().max() > 0.1, "sinks that do not matter test nothing"


def test_step_by_step() -> None:
    """Rows of which one begins later, the last three positions one at a time."""
    query, key, value = draw((S, B), 2)
    core, num_padding_B = build_core(SinkAttention), torch.tensor([0, 4])
    bias = torch.zeros(B, 1, S, S, dtype=torch.float64).masked_fill(~compute_mask(num_padding_B, 0, S, 6), -torch.inf)
    expected = attend_written_out(query, key, value, core.sinks, bias)
    core.cache = LayerCache(B, S)
    ends = [0, S - 3, S - 2, S - 1, S]
    for first, end in itertools.pairwise(ends):
        mask = compute_mask(num_padding_B, first, end - first, 6)
        output = core(*(whole[first:end] for whole in (query, key, value)), mask)
        torch.testing.assert_close(output, expected[first:end], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_more_is_kept_than_without_sinks(dtype: torch.dtype) -> None:
    bias = compute_attention_bias(number_blocks(BLOCKS), dtype)
    for mask in (None, BLOCKS, bias):
        core, without = (build_core(kind, dtype) for kind in (SinkAttention, SdpaAttention))
        num_bytes, theirs = (count_saved_bytes(one, mask, draw((S, B), 2, dtype)) for one in (core, without))
        assert num_bytes == theirs + core.sinks.nbytes


def test_flops_are_those_of_the_kernel() -> None:
    def count(kind: type[SdpaAttention]) -> int:
        with count_flops() as counter:
            build_core(kind)(*draw((S, B), 2), None).sum().backward()
        return counter.get_total_flops()

    assert count(SinkAttention) == count(SdpaAttention) > 0


@pytest.mark.parametrize("capability", [7.0, 9.0])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_what_planned_hardware_runs(kind: str, capability: float) -> None:
    """Its own kernel, forward and backward, with the logarithms in the layout that it has."""
    hardware = SimpleNamespace(kind=kind, compute_capability=capability)
    core = build_core(SinkAttention, torch.bfloat16).to("meta")
    bias = torch.empty(B, 1, S, 72, dtype=torch.bfloat16, device="meta")[..., :S]
    for mask in (None, bias):
        inputs = [one.detach().to("meta").requires_grad_() for one in draw((S, B), 2, torch.bfloat16)]
        with PlannedAttention(hardware), torch.profiler.profile() as profile:
            output = core(*inputs, mask)
        output.sum().backward()
        assert [one.grad.shape for one in (*inputs, core.sinks)] == [one.shape for one in (*inputs, core.sinks)]
        has_flash = capability >= 8 and mask is None
        wanted = (
            "flash_attention_for_cpu" if kind == "cpu" else "flash_attention" if has_flash else "efficient_attention"
        )
        called = [event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key]
        assert called == [f"aten::_scaled_dot_product_{wanted}"]
