"""One weight shard and the adapters merged into it: rounding, bits that come back, time."""

import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from lora_updates import compute_update
from torch import nn

from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.layer import LoraShard, ShardPlace, compute_qkv_rows
from lora_dist.lora.merge import WeightMerge
from lora_dist.lora.spec import AdapterSpec

PLACE = ShardPlace(column_parallel=True, tp_size=1, tp_rank=0)


def build_shard(targets: list[str], size: int, lora_rank: int, b_std: float, num_heads: int = 4) -> LoraShard:
    specs = [
        AdapterSpec(layer=0, target=target, lora_rank=lora_rank, alpha=16, in_features=size, out_features=size)
        for target in targets
    ]
    rows = compute_qkv_rows(num_heads, 1, size // num_heads)
    shard = LoraShard(specs, PLACE, seed=1, clock=DropoutClock(), local_out_features=3 * size, rows=rows)
    with torch.no_grad():
        for spec in specs:
            shard.factors(spec)[1].normal_(std=b_std, generator=torch.Generator().manual_seed(lora_rank))
    return shard


def draw_weight(size: int, dtype: torch.dtype) -> nn.Parameter:
    weight = 0.02 * torch.randn(3 * size, size, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(weight.to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    weight, shard = draw_weight(64, dtype), build_shard(["q_proj", "v_proj"], 64, 4, b_std=0.05)
    exact = weight.double() + compute_update(shard).double()
    WeightMerge(weight).merge(shard)
    nearest = exact.to(dtype)
    if dtype == torch.float32:
        assert (weight - exact).abs().max() < 1e-7
    else:
        assert (weight != nearest).double().mean() < 1e-3  # but for ties that fp32 sees the other way
        torch.testing.assert_close(weight.float(), nearest.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_subtracting_would_drift_and_keeping_does_not(dtype: torch.dtype) -> None:
    weight, shard = draw_weight(64, dtype), build_shard(["q_proj", "v_proj"], 64, 4, b_std=0.05)
    before, update = weight.clone(), compute_update(shard)
    naive = ((before.float() + update).to(dtype).float() - update).to(dtype)
    assert (naive != before).double().mean() > 0.05
    merge = WeightMerge(weight)
    for _ in range(3):
        merge.merge(shard)
        assert not torch.equal(weight, before)
        merge.merge(None)
        assert torch.equal(weight, before)


def test_only_the_adapted_rows_are_kept_and_touched() -> None:
    weight, shard = draw_weight(64, torch.float32), build_shard(["q_proj", "v_proj"], 64, 2, b_std=0.1)
    before, merge = weight.clone(), WeightMerge(weight)
    merge.merge(shard)
    assert merge.kept_bytes == 2 * 64 * 64 * 4
    key_rows = compute_qkv_rows(4, 1, 16)["k_proj"]
    assert torch.equal(weight[key_rows], before[key_rows])
    merge.merge(build_shard(["k_proj"], 64, 3, b_std=0.1))
    assert merge.kept_bytes == 64 * 64 * 4
    changed = (weight != before).any(1)
    assert changed[key_rows].all()
    assert changed.sum() == 64


def test_without_keeping_a_merge_costs_no_memory() -> None:
    weight, shard = draw_weight(64, torch.float32), build_shard(["q_proj"], 64, 2, b_std=0.1)
    expected = weight + compute_update(shard)
    merge = WeightMerge(weight, keep_base=False)
    merge.merge(shard)
    assert merge.kept_bytes == 0
    torch.testing.assert_close(weight.data, expected.data)


@torch.no_grad()
def test_switching_a_layer_of_gpt2_medium_takes_less_than_its_forward_pass() -> None:
    """The linears alone of one layer over 128 tokens, against exchanging q and v at rank 4 in it."""
    size, num_repeats = 1024, 5
    weights = [draw_weight(size, torch.float32), *(torch.randn(size * n, size) for n in (1, 4))]
    wide, x = torch.randn(size, 4 * size), torch.randn(128, size)
    first, second = (build_shard(["q_proj", "v_proj"], size, rank, 0.1, num_heads=16) for rank in (4, 5))
    merge = WeightMerge(weights[0])

    def forward() -> None:
        for weight in weights:
            y = F.linear(x, weight)
        F.linear(y, wide)

    merge.merge(first)
    forward()
    times: dict[str, list[float]] = {"forward": [], "switch": []}
    for repeat in range(num_repeats):
        for name, action in (("forward", forward), ("switch", lambda n=repeat: merge.merge((first, second)[n % 2]))):
            start = time.process_time()
            action()
            times[name].append(time.process_time() - start)
    assert median(times["switch"]) < median(times["forward"])
