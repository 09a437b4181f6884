"""Subspaces of updates, against decompositions of the whole matrices."""

import pytest
import torch

from lora_dist.analysis.projections import WeightShard, draw_directions
from lora_dist.analysis.subspaces import compute_input_directions, compute_similarity, decompose_update


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_update_is_decomposed_without_being_formed() -> None:
    a_RH, b_OR = draw(3, 20), draw(12, 3, seed=1)
    found, whole = decompose_update(a_RH, b_OR, 0.5), 0.5 * b_OR @ a_RH
    torch.testing.assert_close(found.u_OR @ found.s_R.diag() @ found.v_HR.t(), whole)
    torch.testing.assert_close(found.s_R, torch.linalg.svdvals(whole)[:3])
    torch.testing.assert_close(found.u_OR.t() @ found.u_OR, torch.eye(3, dtype=torch.float64))
    assert found.norm == pytest.approx(float(whole.norm()))


def test_similarity_is_the_papers_formula() -> None:
    first, second = (compute_input_directions(draw(rank, 30, seed=rank)) for rank in (4, 7))
    phi = compute_similarity(first, second)
    assert phi.shape == (4, 7)
    for i in range(1, 5):
        for j in range(1, 8):
            expected = (first[:, :i].t() @ second[:, :j]).norm() ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(float(expected))


def test_similarity_tells_containment_from_orthogonality() -> None:
    directions = draw_directions(30, 8, seed=0)
    torch.testing.assert_close(compute_similarity(directions[:, :3], directions)[:, 2:], torch.ones(3, 6).double())
    assert compute_similarity(directions[:, :4], directions[:, 4:]).abs().max() < 1e-12


def test_input_directions_come_strongest_first() -> None:
    directions = draw_directions(30, 2, seed=3)
    a_RH = torch.stack([0.1 * directions[:, 0], 5.0 * directions[:, 1]])
    found = compute_input_directions(a_RH)
    assert abs(float(found[:, 0] @ directions[:, 1])) == pytest.approx(1.0)


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_top_values_of_a_weight(column_parallel: bool, shape: tuple[int, int]) -> None:
    weight_OH = draw(*shape)
    shard = WeightShard(weight_oh=weight_OH, column_parallel=column_parallel, tp_rank=0, group=None)
    torch.testing.assert_close(shard.compute_top_values(4, seed=1), torch.linalg.svdvals(weight_OH)[:4])
    assert shard.compute_norm() == pytest.approx(float(weight_OH.norm()))
