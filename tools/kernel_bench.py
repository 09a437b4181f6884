"""What an adapter adds to one linear's forward and backward: `python tools/kernel_bench.py [--record FILE]`.

The fused projection and the MLP's two linears of GPT-3 13B and 175B, as one tensor-parallel rank holds them, frozen and
with rank 4 on what the paper adapts (q and v) or on the linear itself; one call of each in turn, medians of the ratios
round by round. Nothing is communicated. CPU time on a CPU, CUDA events on a GPU.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.function import NO_COMMUNICATION
from lora_dist.lora.layer import LoraShard, ShardPlace, compute_qkv_rows
from lora_dist.lora.spec import AdapterSpec
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.meter import compute_spread

LORA_RANK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One linear of one model on one of `tp_size` ranks."""

    model: str
    linear: str
    hidden_size: int
    num_heads: int
    tp_size: int

    @property
    def targets(self) -> list[str]:
        return {"qkv": ["q_proj", "v_proj"], "fc1": ["up_proj"], "fc2": ["down_proj"]}[self.linear]

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(in_features, out_features) of one target."""
        h = self.hidden_size
        return {"qkv": (h, h), "fc1": (h, 4 * h), "fc2": (4 * h, h)}[self.linear]

    @property
    def shard_shape(self) -> tuple[int, int]:
        """(out_features, in_features) of this rank's weight."""
        in_features, out_features = self.whole_shape
        if self.linear == "fc2":
            return out_features, in_features // self.tp_size
        return (3 if self.linear == "qkv" else 1) * out_features // self.tp_size, in_features


CASES = [
    Case(model=model, linear=linear, hidden_size=hidden_size, num_heads=num_heads, tp_size=tp_size)
    for model, hidden_size, num_heads, tp_size in (("gpt3_13b", 5120, 40, 2), ("gpt3_175b", 12288, 96, 8))
    for linear in ("qkv", "fc1", "fc2")
]


def build_calls(case: Case, num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One forward and backward, the input's gradient included, over the frozen linear alone and with its adapters."""
    torch.manual_seed(0)
    out_features, in_features = case.shard_shape
    weight_OH = torch.randn(out_features, in_features, device=device, dtype=dtype) * 0.02
    bias_O = torch.zeros(out_features, device=device, dtype=dtype)
    x_SBH = torch.randn(num_tokens, 1, in_features, device=device, dtype=dtype, requires_grad=True)
    dy_SBO = torch.randn(num_tokens, 1, out_features, device=device, dtype=dtype)
    lora = build_lora(case, device)

    def run_frozen() -> None:
        F.linear(x_SBH, weight_OH, bias_O).backward(dy_SBO)
        x_SBH.grad = None

    def run_lora() -> None:
        lora(x_SBH, weight_OH, bias_O, NO_COMMUNICATION).backward(dy_SBO)
        x_SBH.grad = None
        lora.zero_grad(set_to_none=True)

    return {"frozen": run_frozen, "lora": run_lora}


def build_lora(case: Case, device: torch.device) -> LoraShard:
    """The adapters of the first rank, B drawn so that nothing is multiplied by zero."""
    in_features, out_features = case.whole_shape
    specs = [
        AdapterSpec(
            layer=0,
            target=target,
            lora_rank=LORA_RANK,
            alpha=LORA_RANK,
            in_features=in_features,
            out_features=out_features,
        )
        for target in case.targets
    ]
    head_dim = case.hidden_size // case.num_heads
    lora = LoraShard(
        specs,
        ShardPlace(column_parallel=case.linear != "fc2", tp_size=case.tp_size, tp_rank=0),
        seed=0,
        clock=DropoutClock(),
        local_out_features=case.shard_shape[0],
        rows=compute_qkv_rows(case.num_heads // case.tp_size, 1, head_dim) if case.linear == "qkv" else None,
        device=device,
    )
    for name, factor in lora.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(factor, std=0.02)
    return lora


def time_call(call: Callable[[], None], device: torch.device) -> float:
    """Seconds: of CPU time, or between two events on the GPU."""
    if device.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    case: Case, *, num_tokens: int, num_rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    calls = build_calls(case, num_tokens, device, dtype)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(num_rounds + 1):  # the first is not counted
        names = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
        for name in names:
            seconds = time_call(calls[name], device)
            if round_ > 0:
                samples[name].append(seconds)
    ratios = [lora / frozen for lora, frozen in zip(samples["lora"], samples["frozen"], strict=True)]
    return {
        **asdict(case),
        "targets": case.targets,
        "shard_shape": case.shard_shape,
        "seconds": {name: asdict(compute_spread(values)) for name, values in samples.items()},
        "lora/frozen": asdict(compute_spread(ratios)),
        "samples": samples,
    }


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["model      linear  shard          frozen, s  with LoRA : frozen (quartiles)"]
    for row in rows:
        ratio, (out_features, in_features) = row["lora/frozen"], row["shard_shape"]
        lines.append(
            f"{row['model']:<10} {row['linear']:<7} {f'{out_features} x {in_features}':<14}"
            f" {row['seconds']['frozen']['median']:>9.4f}"
            f"  {ratio['median']:.4f} ({ratio['p25']:.4f}-{ratio['p75']:.4f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="JSON file to write")
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--num-rounds", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    if device.type == "cpu":
        torch.set_num_threads(1)
    options = {"num_tokens": args.num_tokens, "num_rounds": args.num_rounds}
    rows = [measure(case, **options, device=device, dtype=dtype) for case in CASES]
    print(format_rows(rows))
    if args.record is not None:
        record = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": describe_environment(),
            "lora_rank": LORA_RANK,
            "dtype": args.dtype,
            "clock": "cpu_seconds" if device.type == "cpu" else "seconds",
            **options,
            "rows": rows,
        }
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
