"""The learning-rate schedule at its corners."""

import pytest

from lora_dist.config import OptimConfig
from lora_dist.optim import compute_lr


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.5]), ("cosine", [0.5, 1.0, 1.0, 0.5])],
)
def test_schedule(schedule: str, expected: list[float]) -> None:
    optim = OptimConfig(lr=1.0, schedule=schedule, num_warmup_steps=2)
    steps = (0, 1, 2, 6)  # warm-up, its end, the top, half way down to step 10
    assert [compute_lr(optim, step=step, num_steps=10) for step in steps] == pytest.approx(expected)


def test_lr_stays_positive_to_the_last_step() -> None:
    optim = OptimConfig(lr=1.0, schedule="cosine", num_warmup_steps=0)
    assert compute_lr(optim, step=9, num_steps=10) > 0
