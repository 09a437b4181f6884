"""What a validation tells of a model in training, and which one was the best so far; standard library only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Validation = dict[str, float | None]
"""`valid_loss` and, where the task has them, scores by name; None where one could not be computed. Empty without a
validation split."""
Validate = Callable[[], Validation]
"""Takes the whole validation split; every process calls it and gets the same."""


@dataclass(slots=True)
class Best:
    """The best value of one metric over the validations of a run."""

    highest: bool
    """Whether more is better."""
    value: float | None = None
    """None before the first number."""

    def take(self, value: float | None) -> bool:
        """Whether it is better than all before it, and is then the one to beat; of equals the first stays."""
        if value is None or math.isnan(value):
            return False
        is_better = self.value is None or (value > self.value if self.highest else value < self.value)
        if is_better:
            self.value = value
        return is_better
