"""A run's optimizer and its loop: steps, batches, and what happens between steps; standard library only."""

from dataclasses import dataclass

from lora_dist.plan_config import RECOMPUTE
from lora_dist.refusals import require, require_one_of, require_seed

_NUM_STEPS = 100
_IN_EPOCHS = (("eval_every", "eval_every_epochs"), ("save_every", "save_every_epochs"))


def _require_one(group: str, owner: object, key: str, other: str) -> None:
    """ValueError where both of two ways to say the same are used."""
    first, second = getattr(owner, key), getattr(owner, other)
    require(
        not first or second is None,
        f"{group}.{key}={first} and {group}.{other}={second} are both set; leave one of them out"
        f" ({group}.{other}=null, or {group}.{key}={'null' if key == 'num_steps' else 0})",
    )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: str = "linear"
    """linear or cosine decay to zero after the warm-up, or constant."""
    num_warmup_steps: int = 0
    warmup_ratio: float | None = None
    """Share of the steps that warm up, in place of num_warmup_steps."""
    clip_grad_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    label_smoothing: float = 0.0
    lora_plus_ratio: float = 1.0
    """Learning rate of lora_B over that of lora_A (LoRA+)."""

    def __post_init__(self) -> None:
        require_one_of("optim.schedule", self.schedule, ("linear", "cosine", "constant"))
        for key in ("lr", "eps", "lora_plus_ratio"):
            value = getattr(self, key)
            require(0.0 < value < float("inf"), f"optim.{key}={value} must be positive and finite")
        for key in ("beta1", "beta2"):
            require(0.0 <= getattr(self, key) < 1.0, f"optim.{key}={getattr(self, key)} must lie in [0, 1)")
        require(self.num_warmup_steps >= 0, f"optim.num_warmup_steps={self.num_warmup_steps} must not be negative")
        for key in ("weight_decay", "clip_grad_norm"):
            value = getattr(self, key)
            require(0 <= value < float("inf"), f"optim.{key}={value} must be finite and not negative")
        ratio = self.warmup_ratio
        require(ratio is None or 0.0 <= ratio <= 1.0, f"optim.warmup_ratio={ratio} must lie in [0, 1]")
        _require_one("optim", self, "num_warmup_steps", "warmup_ratio")
        require(0.0 <= self.label_smoothing < 1.0, f"optim.label_smoothing={self.label_smoothing} must lie in [0, 1)")


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """Steps, batches, and what happens between steps. A step is one optimizer step."""

    num_steps: int | None = None
    """null means as many as num_epochs takes, or 100."""
    num_epochs: float | None = None
    """Times through the training data, in place of num_steps."""
    micro_batch_size: int = 8
    """Rows in one forward pass of one replica."""
    global_batch_size: int | None = None
    """Rows in one step over all replicas; null means micro_batch_size x dp_size."""
    seed: int = 0
    recompute: str = "none"
    """Activations computed again in backward: none, selective (the MLP's), full (whole layers), or auto, the least that
    fits the memory of `hardware`."""
    recompute_layers: int | None = None
    """Layers of each pipeline stage that recompute, its first ones; null means all."""
    num_warmup_steps_timing: int = 3
    """Steps left out of the timing."""
    eval_every: int = 0
    """Steps between validations; 0 validates before the first and after the last step only."""
    eval_every_epochs: float | None = None
    """Times through the training data between validations, in place of eval_every."""
    keep_best: bool = False
    """Write what has been trained also at each validation that is better than all before, as best_adapter/ or
    best_model/: by the validation loss, or by the first score of a task with labels."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves after the last step only."""
    save_every_epochs: float | None = None
    """Times through the training data between checkpoints, in place of save_every."""
    keep_checkpoints: int = 2
    check_replicas_every: int = 0
    """Steps between checks that replicated factors are bit-identical over TP; 0 never."""

    @property
    def total_steps(self) -> int:
        """Once `settle_epochs` has made steps of epochs."""
        assert self.num_epochs is None, "left open"
        return _NUM_STEPS if self.num_steps is None else self.num_steps

    @property
    def validates_between(self) -> bool:
        """Whether the run validates at some steps between its first and its last."""
        return self.eval_every > 0 or self.eval_every_epochs is not None

    @property
    def recomputation(self) -> str:
        """For reports: `full`, or `full in 3 layers of each stage`."""
        if self.recompute_layers is None:
            return self.recompute
        return f"{self.recompute} in {self.recompute_layers} layers of each stage"

    def __post_init__(self) -> None:
        require_one_of("loop.recompute", self.recompute, RECOMPUTE)
        require(
            self.recompute_layers is None or self.recompute in ("selective", "full"),
            f"loop.recompute_layers={self.recompute_layers} needs loop.recompute=selective or full,"
            f" got {self.recompute}",
        )
        for key in ("num_steps", "micro_batch_size", "global_batch_size", "keep_checkpoints"):
            count = getattr(self, key)
            require(count is None or count >= 1, f"loop.{key}={count} must be at least 1")
        for key in ("num_epochs", "eval_every_epochs", "save_every_epochs"):
            times = getattr(self, key)
            require(times is None or 0 < times < float("inf"), f"loop.{key}={times} must be positive and finite")
        require_seed("loop.seed", self.seed)
        for steps, epochs in (*_IN_EPOCHS, ("num_steps", "num_epochs")):
            _require_one("loop", self, steps, epochs)
        for key in ("eval_every", "save_every", "num_warmup_steps_timing", "check_replicas_every"):
            require(getattr(self, key) >= 0, f"loop.{key}={getattr(self, key)} must not be negative")
