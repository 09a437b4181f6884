"""Dynamic loss scale for fp16 activations, and the guard against gradients that are not finite."""

from dataclasses import dataclass

INITIAL_SCALE = 2.0**12
_GROWTH_INTERVAL = 1000
_MAX_CONSECUTIVE_SKIPS = 20


@dataclass(slots=True)
class LossScale:
    """Halves when a step overflows, doubles after 1000 good ones. `dynamic` False keeps it at 1."""

    dynamic: bool
    value: float = 1.0
    num_good_steps: int = 0
    num_consecutive_skips: int = 0

    def __post_init__(self) -> None:
        if self.dynamic and self.value == 1.0:
            self.value = INITIAL_SCALE

    def update(self, *, finite: bool) -> None:
        """Tell it how a step went. ValueError after 20 steps in a row that had to be skipped."""
        self.num_good_steps = self.num_good_steps + 1 if finite else 0
        self.num_consecutive_skips = 0 if finite else self.num_consecutive_skips + 1
        if self.num_consecutive_skips >= _MAX_CONSECUTIVE_SKIPS:
            raise ValueError(
                f"{_MAX_CONSECUTIVE_SKIPS} steps in a row had gradients that are not finite (loss scale"
                f" {self.value:g}); lower optim.lr or check the data and the base checkpoint"
            )
        if not self.dynamic:
            return
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.num_good_steps % _GROWTH_INTERVAL == 0:
            self.value *= 2
