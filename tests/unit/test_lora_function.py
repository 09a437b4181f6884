"""The fused linear against the definition h = W x + b + (alpha / r) B A x, gradients included, B not zero."""

import pytest
import torch
from lora_updates import compute_update

from lora_dist.lora.dropout import DropoutClock, DropoutMask, compute_row_keys
from lora_dist.lora.factors import draw_lora_A, slice_shard
from lora_dist.lora.function import NO_COMMUNICATION, lora_linear
from lora_dist.lora.layer import LoraShard, ShardPlace, compute_qkv_rows
from lora_dist.lora.spec import AdapterSpec

S, B, H, R = 5, 3, 8, 3


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    torch.manual_seed(0)
    mask = None
    if dropout:
        row_keys_B = compute_row_keys(torch.arange(B), seed=1, step=2)
        mask = DropoutMask(row_keys_B=row_keys_B, adapter_name="layers.0.q_proj", probability=dropout)
    weight = torch.randn(7, H, dtype=torch.float64)

    def apply(x: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, weight, bias, a, b, mask=mask)

    assert torch.autograd.gradcheck(apply, (leaf(S, B, H), leaf(7), leaf(R, H), leaf(7, R)))


def test_no_input_gradient_where_none_is_asked() -> None:
    x = torch.randn(S, B, H)
    a, b = torch.randn(R, H, requires_grad=True), torch.randn(7, R, requires_grad=True)
    lora_linear(x, torch.randn(7, H), None, a, b).sum().backward()
    assert x.grad is None
    assert a.grad is not None


def build_fused_shard(lora_ranks: dict[str, int]) -> LoraShard:
    specs = [
        AdapterSpec(layer=0, target=target, lora_rank=lora_rank, alpha=2.0, in_features=H, out_features=H)
        for target, lora_rank in lora_ranks.items()
    ]
    place = ShardPlace(column_parallel=True, tp_size=1, tp_rank=0)
    rows = compute_qkv_rows(num_groups=2, num_query_heads_per_group=1, head_dim=H // 2)
    shard = LoraShard(specs, place, seed=0, clock=DropoutClock(), local_out_features=3 * H, rows=rows)
    for name, parameter in shard.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    return shard


def interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Megatron's order of the fused output features: for each head its q, k and v."""
    heads = [t.unflatten(-1, (num_heads, -1)) for t in (q, k, v)]
    return torch.stack(heads, dim=-2).flatten(-3)


@pytest.mark.parametrize("lora_ranks", [{"q_proj": 2, "v_proj": 3}, {"q_proj": 1, "k_proj": 2, "v_proj": 4}])
def test_fused_projection_updates_just_its_targets(lora_ranks: dict[str, int]) -> None:
    torch.manual_seed(0)
    shard = build_fused_shard(lora_ranks)
    x = torch.randn(S, B, H)
    updates = {target: torch.zeros(S, B, H) for target in ("q_proj", "k_proj", "v_proj")}
    for spec in shard.specs:
        a, b = shard.factors(spec)
        updates[spec.target] = spec.scaling * (x @ a.t()) @ b.t()
    expected = interleave(updates["q_proj"], updates["k_proj"], updates["v_proj"], num_heads=2)
    actual = shard(x, torch.zeros(3 * H, H), None, NO_COMMUNICATION)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x @ compute_update(shard).t(), expected, atol=1e-6, rtol=1e-5)


def test_grouped_query_rows() -> None:
    rows = compute_qkv_rows(num_groups=2, num_query_heads_per_group=2, head_dim=1)
    assert rows["q_proj"].tolist() == [0, 1, 4, 5]
    assert rows["k_proj"].tolist() == [2, 6]
    assert rows["v_proj"].tolist() == [3, 7]


def test_start_is_the_base_model() -> None:
    shard = LoraShard(
        [AdapterSpec(layer=0, target="o_proj", lora_rank=2, alpha=4.0, in_features=H, out_features=7)],
        ShardPlace(column_parallel=False, tp_size=1, tp_rank=0),
        seed=0,
        clock=DropoutClock(),
        local_out_features=7,
    )
    x, weight = torch.randn(S, B, H), torch.randn(7, H)
    assert torch.equal(shard(x, weight, None, NO_COMMUNICATION), x @ weight.t())


def test_start_depends_on_seed_and_name_only() -> None:
    spec = AdapterSpec(layer=1, target="down_proj", lora_rank=3, alpha=1.0, in_features=8, out_features=4)
    whole = draw_lora_A(spec, seed=5)
    assert torch.equal(whole, draw_lora_A(spec, seed=5))
    assert not torch.equal(whole, draw_lora_A(spec, seed=6))
    parts = [slice_shard(whole, 1, 4, tp_rank) for tp_rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_start_is_gaussian_with_the_authors_variance() -> None:
    spec = AdapterSpec(layer=0, target="q_proj", lora_rank=64, alpha=1.0, in_features=4096, out_features=4)
    a = draw_lora_A(spec, seed=0)
    assert a.var().item() == pytest.approx(1 / (3 * 4096), rel=0.02)
    fourth_moment = (a / a.std()).pow(4).mean().item()
    assert fourth_moment == pytest.approx(3.0, rel=0.03)  # 1.8 if it were uniform
