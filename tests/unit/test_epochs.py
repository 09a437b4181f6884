"""Epochs and shares of a run as steps, and what cannot be both."""

import pytest

from lora_dist.config import LoopConfig, OptimConfig
from lora_dist.epochs import settle_epochs


def test_epochs_become_steps() -> None:
    """10 rows in batches of 4 are two and a half steps; a part of a step is one."""
    loop = LoopConfig(num_epochs=3, eval_every_epochs=1, save_every_epochs=0.1, micro_batch_size=2, global_batch_size=4)
    settled, optim = settle_epochs(loop, OptimConfig(warmup_ratio=0.25), rows_per_epoch=10, dp_size=2)
    assert (settled.total_steps, settled.eval_every, settled.save_every, optim.num_warmup_steps) == (8, 3, 1, 2)
    assert settle_epochs(settled, optim, rows_per_epoch=10, dp_size=2) == (settled, optim)


def test_a_rounding_error_is_no_step() -> None:
    loop, _ = settle_epochs(
        LoopConfig(num_epochs=1.1, micro_batch_size=10), OptimConfig(), rows_per_epoch=100, dp_size=1
    )
    assert loop.total_steps == 11


def test_steps_stay_as_they_are() -> None:
    loop, optim = settle_epochs(LoopConfig(eval_every=7), OptimConfig(num_warmup_steps=5), rows_per_epoch=1, dp_size=1)
    assert (loop.total_steps, loop.eval_every, loop.save_every, optim.num_warmup_steps) == (100, 7, 0, 5)


def test_steps_of_an_unsettled_run_are_not_asked_for() -> None:
    with pytest.raises(AssertionError):
        _ = LoopConfig(num_epochs=2).total_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_steps": 5, "num_epochs": 1},
            r"loop.num_steps=5 and loop.num_epochs=1 are both set; leave one of them out",
        ),
        ({"eval_every": 5, "eval_every_epochs": 1}, r"\(loop.eval_every_epochs=null, or loop.eval_every=0\)"),
        ({"save_every": 5, "save_every_epochs": 1}, "loop.save_every=5 and loop.save_every_epochs=1"),
        ({"num_epochs": 0}, "loop.num_epochs=0 must be positive"),
        ({"num_epochs": float("inf")}, "loop.num_epochs=inf must be positive and finite"),
        ({"num_steps": 0}, "loop.num_steps=0 must be at least 1"),
    ],
)
def test_loop_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**options)


def test_two_warm_ups() -> None:
    with pytest.raises(ValueError, match=r"optim.num_warmup_steps=5 and optim.warmup_ratio=0.1 are both set"):
        OptimConfig(num_warmup_steps=5, warmup_ratio=0.1)
    with pytest.raises(ValueError, match=r"optim.warmup_ratio=2 must lie in \[0, 1\]"):
        OptimConfig(warmup_ratio=2)
