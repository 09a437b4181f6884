"""One partitioned optimizer over what trains: accumulate a step's microbatches, reduce once, step once."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lora_dist.config import OptimConfig, ZeroConfig
from lora_dist.gradients import all_gradients_finite, compute_grad_norm, counts_in_norm
from lora_dist.parameters import TrainableParameter
from lora_dist.topology import Topology
from lora_dist.uncompiled import without_compiler
from lora_dist.zero.ds_config import build_ds_config
from lora_dist.zero.loss_scale import LossScale
from lora_dist.zero.param_groups import build_groups, registered
from lora_dist.zero.state import (
    iterate_step_counters,
    materialize_adam_state,
    read_parameter_state,
    write_parameter_state,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one optimizer step did; the same on every process."""

    grad_norm: float
    skipped: bool


def build_zero_engine(
    model: nn.Module,
    trainable: list[TrainableParameter],
    *,
    zero: ZeroConfig,
    optim: OptimConfig,
    micro_batch_size: int,
    dtype: torch.dtype,
    topology: Topology,
) -> "ZeroEngine":
    """Hand the model's trainable parameters to DeepSpeed. Every process calls it, those without any too.

    `dtype` is the activations'. Adapters are fp32 and need no masters; trainable base weights in bf16 or fp16 get
    DeepSpeed's. At stage 3 the frozen parameters are partitioned as well.
    """
    deepspeed = _import_deepspeed(topology)
    groups, placeholders = build_groups(trainable, optim, topology)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for one in trainable if zero.stage > 0 else ():
        # What DeepSpeed's norm asks for: sharded parameters count on every TP rank, others on the first alone. A shard
        # that ranks share counts on the first of them, and the others are no first rank.
        one.parameter.tensor_model_parallel = counts_in_norm(one, topology.tp_rank)
        one.parameter.ds_pipe_replicated = not one.owned
    master_dtypes = {p.dtype for p in parameters}
    master_dtype = (
        "fp32" if master_dtypes == {torch.float32} else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    )
    optimizer = torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    # DeepSpeed loads every optimizer that it knows, one of them compiled, to tell whether this is one of them.
    with registered(model, placeholders), without_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            mpu=_Groups(topology),
            config=build_ds_config(
                zero,
                optim,
                micro_batch_size=micro_batch_size,
                num_trainable=sum(one.parameter.numel() for one in trainable),
                master_dtype=master_dtype,
                on_gpu=topology.device.type == "cuda",
            ),
            dist_init_required=False,
        )
    scale = LossScale(dynamic=dtype == torch.float16)
    return ZeroEngine(engine, trainable, placeholders, zero.stage, optim.clip_grad_norm, scale, topology)


class ZeroEngine:
    """DeepSpeed's engine as this project uses it: Megatron runs forward and backward, ZeRO reduces and steps."""

    def __init__(
        self,
        engine: Any,
        trainable: list[TrainableParameter],
        placeholders: list[nn.Parameter],
        stage: int,
        clip_grad_norm: float,
        scale: LossScale,
        topology: Topology,
    ) -> None:
        self.placeholders = placeholders
        """What fills groups that only other stages have tensors of; see `build_groups`."""
        self.deepspeed, self.trainable, self.stage = engine, trainable, stage
        self.clip_grad_norm, self.scale, self.topology = clip_grad_norm, scale, topology
        self._owns_masters = not (engine.fp16_enabled() or engine.bfloat16_enabled())
        self._finite = True
        self._lr_ratios = [group.pop("lr_ratio", 1.0) for group in self.adam.param_groups]
        materialize_adam_state(self.deepspeed.optimizer, self.adam, stage)

    @property
    def adam(self) -> torch.optim.AdamW:
        """The torch optimizer that DeepSpeed drives."""
        optimizer = self.deepspeed.optimizer
        return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer

    @property
    def loss_scale(self) -> float:
        return self.scale.value

    @property
    def num_steps(self) -> int:
        """Steps that Adam has taken, skipped ones left out."""
        counters = list(iterate_step_counters(self.deepspeed.optimizer, self.adam, self.stage))
        return int(counters[0].item())

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for counter in iterate_step_counters(self.deepspeed.optimizer, self.adam, self.stage):
            counter.fill_(value)

    def read_state(self, one: TrainableParameter) -> dict[str, torch.Tensor]:
        """`value`, `exp_avg` and `exp_avg_sq` of this TP shard, whole over DP, fp32 on the CPU. Collective over DP."""
        return read_parameter_state(one.parameter, self.adam, self.stage)

    def read_value(self, one: TrainableParameter) -> dict[str, torch.Tensor]:
        """`value` alone, as `read_state` gives it. Collective over DP."""
        return read_parameter_state(one.parameter, self.adam, self.stage, ("value",))

    def write_state(self, one: TrainableParameter, state: Mapping[str, torch.Tensor]) -> None:
        """Set what `read_state` reads, from the same whole shard on every replica."""
        write_parameter_state(one.parameter, state, self.adam, self.stage)

    def check_outcome(self, valid_loss: float | None) -> None:
        """ValueError, on every process, where no step was usable, or where what has been trained or its loss on the
        validation data is not finite. Collective.
        """
        finite = torch.tensor(
            float(all(bool(master.isfinite().all()) for master in self.adam.state)), device=self.topology.device
        )
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        remedy = "lower optim.lr, or check the data and the base checkpoint"
        if self.num_steps == 0:
            raise ValueError(f"no step was usable: no gradient was finite, so nothing has been trained; {remedy}")
        if not finite.item():
            raise ValueError(f"what has been trained is not finite, so it is not written; {remedy}")
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise ValueError(
                f"what has been trained has a validation loss of {valid_loss}; it is not written; {remedy}"
            )

    def read_loss_scale(self) -> dict[str, float]:
        """The loss scale and its counters."""
        return asdict(self.scale)

    def write_loss_scale(self, state: Mapping[str, float]) -> None:
        """Set what `read_loss_scale` read. A run in another dtype, which needs another scale, keeps its own."""
        if state.get("dynamic", state.get("value") != 1.0) == self.scale.dynamic:
            for key in asdict(self.scale).keys() & state.keys():
                setattr(self.scale, key, state[key])
        self._tell_loss_scale()

    def _tell_loss_scale(self) -> None:
        """To DeepSpeed, where it holds fp16's masters: it undoes the scale, and must not change it in between."""
        if self.deepspeed.fp16_enabled():
            self.deepspeed.optimizer.loss_scaler.cur_scale = self.scale.value

    def set_lr(self, lr: float) -> None:
        """Base learning rate; lora_B's group takes it times optim.lora_plus_ratio."""
        for group, ratio in zip(self.deepspeed.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = lr * ratio

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss that backward starts from."""
        return loss * self.scale.value if self._owns_masters else self.deepspeed.scale(loss)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around one step's microbatches and sums over TP: gradients stay in `.grad`, at its end reduced over DP."""
        if self.stage == 0:
            yield
            self._unscale()
            self.deepspeed.allreduce_gradients()
            return
        with self.deepspeed.coalesce_grad_reduction():
            yield
            self._unscale()

    def _unscale(self) -> None:
        """Undo the loss scale and agree on whether all gradients are finite; DeepSpeed does both for its masters."""
        if not self._owns_masters:
            return
        if self.scale.value != 1.0:
            for one in self.trainable:
                if one.parameter.grad is not None:
                    one.parameter.grad.mul_(1.0 / self.scale.value)
        self._finite = all_gradients_finite(self.trainable, self.topology)

    def step(self) -> StepOutcome:
        """Clip by the true global norm, step, clear the gradients. A step that is not finite changes nothing.

        ValueError, on every process, after 20 such steps in a row.
        """
        outcome = self._step() if self._finite else self._skip()
        self.scale.update(finite=not outcome.skipped)
        self._tell_loss_scale()
        return outcome

    def _step(self) -> StepOutcome:
        grad_norm = self._clip() if self.stage == 0 else None
        self.deepspeed.step()
        if grad_norm is None:
            grad_norm = float(self.deepspeed.get_global_grad_norm())
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return StepOutcome(grad_norm=grad_norm, skipped=skipped)

    def _clip(self) -> float:
        norm = compute_grad_norm(self.trainable, self.topology)
        if self.clip_grad_norm > 0:
            factor = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for one in self.trainable:
                one.parameter.grad.mul_(factor)
        return norm.item()

    def _skip(self) -> StepOutcome:
        self.deepspeed.optimizer.zero_grad()
        for one in self.trainable:
            one.parameter.grad = None
        return StepOutcome(grad_norm=float("nan"), skipped=True)


def _import_deepspeed(topology: Topology) -> Any:
    """deepspeed for this device; on the CPU without its compiled extras, so that no compiler is needed."""
    if topology.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with without_compiler():
        import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    if topology.device.type == "cpu":
        # Asking this table for the first time compiles test programs; gloo serves for what it would offer.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
        # DeepSpeed takes fp16 for impossible where the CPU has no instructions for it; torch computes it on any.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


class _Groups:
    """Megatron's process groups under the names DeepSpeed asks for."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tp_size

    def get_model_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._topology.model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._topology.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.zero_size

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        return self._topology.zero_group
