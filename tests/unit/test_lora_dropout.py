"""LoRA dropout: the mask is a function of its key, whatever part of the tensor a rank holds."""

import pytest
import torch

from lora_dist.lora.dropout import DropoutMask, compute_row_keys

S, B, H = 64, 8, 256


def mask(
    probability: float = 0.3, *, seed: int = 0, step: int = 0, name: str = "a", rows: range = range(B), **offsets: int
) -> DropoutMask:
    row_keys_B = compute_row_keys(torch.tensor(list(rows)), seed=seed, step=step)
    return DropoutMask(row_keys_B=row_keys_B, adapter_name=name, probability=probability, **offsets)


WHOLE = mask().apply(torch.ones(S, B, H))


def test_kept_elements_are_scaled() -> None:
    assert sorted(WHOLE.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_rate_along_every_dimension(probability: float) -> None:
    dropped = (mask(probability).apply(torch.ones(S, B, H)) == 0).float()
    assert dropped.mean().item() == pytest.approx(probability, abs=0.005)
    for dims in ((0, 1), (1, 2), (0, 2)):
        # 5 standard deviations of a fair mask's rate in the smallest slice
        smallest = dropped.numel() / max(dropped.shape)
        assert (dropped.mean(dims) - probability).abs().max() < 5 * (probability * (1 - probability) / smallest) ** 0.5


def test_slices_are_those_of_the_whole() -> None:
    part = mask(rows=range(2, 5), position_offset=16, feature_offset=64).apply(torch.ones(32, 3, 128))
    assert torch.equal(part, WHOLE[16:48, 2:5, 64:192])


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"name": "b"}, {"rows": range(B, 2 * B)}])
def test_every_part_of_the_key_changes_the_mask(other: dict) -> None:
    agreement = (mask(0.5, **other).apply(torch.ones(S, B, H)) == mask(0.5).apply(torch.ones(S, B, H))).float().mean()
    assert agreement.item() == pytest.approx(0.5, abs=0.01)


def test_features_are_uncorrelated_between_tokens() -> None:
    kept = (mask(0.5).apply(torch.ones(S, B, H)) != 0).float().flatten(0, 1) - 0.5
    correlation = kept @ kept.t() / (0.25 * H)
    off_diagonal = correlation - torch.diag(correlation.diag())
    assert off_diagonal.abs().max() < 6 / H**0.5
