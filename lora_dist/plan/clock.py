"""How long operations and messages take on given hardware: the slower of computing and moving bytes, one at a time."""

from typing import Any

import torch

from lora_dist.config import HardwareConfig
from lora_dist.measure.collectives import Collective
from lora_dist.measure.flops import build_flop_formulas
from lora_dist.plan.tensors import find_tensors

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ALLOCATING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"}


class ComputeClock:
    """Adds up FLOPs, as torch counts them, and seconds of the operations it is told of."""

    def __init__(self, hardware: HardwareConfig) -> None:
        self.flops = 0
        self.seconds = 0.0
        self._formulas = build_flop_formulas()
        self._flops_per_s = {
            dtype: tflops * 1e12 * hardware.achievable_fraction for dtype, tflops in hardware.peak_tflops.items()
        }
        self._bytes_per_s = hardware.memory_gb_s * 1e9 * hardware.memory_fraction
        self._launch_s = hardware.launch_us * 1e-6

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """One operation and its result. A view takes no time."""
        formula = self._formulas.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        self.flops += flops
        if func.is_view or func._overloadpacket.__name__ in _ALLOCATING:
            return
        tensors = find_tensors((args, kwargs, out))
        nbytes = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        computing = flops * _find_computed_share(func, args, kwargs) / self._rate(tensors[0].dtype) if flops else 0.0
        self.seconds += max(computing, nbytes / self._bytes_per_s, self._launch_s)

    def _rate(self, dtype: torch.dtype) -> float:
        name = DTYPE_NAMES.get(dtype, "fp32")
        return self._flops_per_s.get(name, self._flops_per_s["fp32"])


def _find_computed_share(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Of the FLOPs that torch counts: half of causal attention's, whose scores above the diagonal are counted."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return 0.5 if given.get("is_causal") else 1.0


def compute_message_seconds(one: Collective, group_size: int, *, within_node: bool, hardware: HardwareConfig) -> float:
    """One call, by the ring's traffic: an all-reduce passes every byte twice, a gather or scatter once."""
    if group_size == 1:
        return 0.0
    bandwidth = (hardware.link_gb_s if within_node else hardware.network_gb_s) * 1e9
    latency = (hardware.link_latency_us if within_node else hardware.network_latency_us) * 1e-6
    share = (group_size - 1) / group_size
    passes = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}
    return latency + passes.get(one.op, 1.0) * one.payload_bytes / bandwidth
