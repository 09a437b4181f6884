"""Attention of parts of rows, one process after the other in this one, against whole rows: outputs and gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from lora_dist.batch import RowBlocks, number_blocks
from lora_dist.mcore.attention import compute_attention_bias
from lora_dist.mcore.context_attention import _join, attend_over_processes
from lora_dist.mcore.kernels import ON_CPU, write_out_heads
from lora_dist.mcore.row_group import RowGroup
from lora_dist.row_shard import RowShard

S, B, A, CP = 64, 2, 4, 2
KINDS = {
    "whole": {},
    "packed": {"blocks": ((20, 44), (64,))},
    "window": {"window": 7},
    "packed-window": {"blocks": ((20, 44), (64,)), "window": 7},
    "a block one longer than the window": {"blocks": ((20, 44), (63, 1)), "window": 62},
    "sinks": {"sinks": True, "num_kv_heads": 2},
    "sinks-window": {"sinks": True, "window": 7, "num_kv_heads": 1},
    "narrow-values": {"value_size": 8},
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def attend_written_out(
    inputs: list[torch.Tensor], sinks_A: torch.Tensor | None, blocks: RowBlocks | None, window: int | None
) -> torch.Tensor:
    """[S, B, A, V], in fp64."""
    query, key, value = (one.double().permute(1, 2, 0, 3) for one in inputs)
    key, value = write_out_heads(key, query), write_out_heads(value, query)
    block_ids = number_blocks(blocks or ((S,),) * B).to(query.device)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    scores = scores + compute_attention_bias(block_ids, torch.float64, window)
    if sinks_A is not None:
        scores = torch.cat([scores, sinks_A.double()[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., :S] @ value).permute(2, 0, 1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_whole_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parts(kind, "cpu", torch.float64, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_on_a_gpu(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parts(kind, "cuda", dtype, monkeypatch)


def check_parts(kind: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(**{"blocks": None, "window": None, "sinks": False, "value_size": 16} | KINDS[kind])
    num_kv_heads = KINDS[kind].get("num_kv_heads", A)
    generator = torch.Generator().manual_seed(0)
    shapes = [(A, 16), (num_kv_heads, 16), (num_kv_heads, given.value_size)]
    inputs = [torch.randn(S, B, *shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    sinks_A = Parameter(torch.linspace(-1, 1, A).to(device, dtype)) if given.sinks else None
    weights = torch.randn(S, B, A, given.value_size, generator=generator).to(device, dtype)
    leaves = [*inputs, *([] if sinks_A is None else [sinks_A])]
    expected_output = attend_written_out(inputs, sinks_A, given.blocks, given.window)
    expected = torch.autograd.grad((expected_output * weights.double()).sum(), leaves)

    pairs, dpairs = torch.cat(inputs[1:], dim=-1).detach(), torch.zeros_like(torch.cat(inputs[1:], dim=-1))
    monkeypatch.setattr(RowGroup, "gather", lambda *_: pairs)

    def scatter_sums(row_group: RowGroup, dpairs_SBAE: torch.Tensor) -> torch.Tensor:
        dpairs.add_(dpairs_SBAE)
        return torch.cat([dpairs_SBAE[start:end] for start, end in row_group.shard.list_parts(S)])

    monkeypatch.setattr(RowGroup, "scatter_sums", scatter_sums)
    output, dquery = (torch.zeros(S, B, A, size, device=device, dtype=dtype) for size in (given.value_size, 16))
    dsinks = torch.zeros(A, device=device, dtype=torch.float64)
    for cp_rank in range(CP):
        shard = RowShard(cp_size=CP, cp_rank=cp_rank)
        here = shard.find_positions(0, S // CP, S // CP, torch.device(device))
        mine = [one.detach()[here].requires_grad_() for one in inputs]
        row_group = RowGroup(group=None, shard=shard)  # type: ignore[arg-type]
        part = attend_over_processes(*mine, sinks_A, given.blocks, None, given.window, row_group)
        grads = torch.autograd.grad((part * weights[here]).sum(), [*mine, *([] if sinks_A is None else [sinks_A])])
        output[here], dquery[here] = part.detach(), grads[0]
        dsinks += grads[3].double() if given.sinks else 0
    actual = [output, dquery, *dpairs.split([16, given.value_size], dim=-1), *([dsinks] if given.sinks else [])]
    for one, other in zip(actual, [expected_output, *expected], strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_joined_outputs_are_rounded_once() -> None:
    """In bf16 two calls' outputs are about as exact as one call's over the same keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, A, 2 * S, 64, generator=generator).bfloat16() for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    front, back = slice(0, S), slice(S, 2 * S)
    whole, *_ = ON_CPU.attend(query, key, value, None, True, 0.125)
    own, own_lse, *_ = ON_CPU.attend(query[:, :, back], key[:, :, back], value[:, :, back], None, True, 0.125)
    before, lse, *_ = ON_CPU.attend(query[:, :, back], key[:, :, front], value[:, :, front], None, False, 0.125)
    joined, _ = _join(own, own_lse, before, lse)
    errors = [(one.double() - exact[:, :, back]).square().mean().sqrt() for one in (joined, whole[:, :, back])]
    assert errors[0] < 1.5 * errors[1]


def test_a_kernel_is_handed_gradients_in_a_layout_that_it_takes() -> None:
    """That of a sum is one number, which has no stride between features."""
    strides = []
    kernel = replace(ON_CPU, run_backward=lambda doutput, *_: strides.append(doutput.stride(-1)))
    kernel.differentiate(torch.ones(()).expand(1, 2, 3, 4), (), None, True, (), (), None)
    assert strides == [1]
