"""What a sliding window saves: `python tools/window_record.py --record FILE [--seq-len N] [--num-rounds N]`.

One layer's attention, forward and backward, over one row of which each position sees the model's window: under a mask
over the whole row and tile by tile, in turn, medians of the ratios round by round. Heads are those of one
tensor-parallel rank. CPU time on a CPU, on a GPU the time until the device is done.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.mcore.attention import SdpaAttention, SinkAttention, compute_attention_bias, compute_window_mask
from lora_dist.mcore.cpu import use_cpu_stand_ins
from lora_dist.mcore.window import Tiles
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.measure.meter import compute_spread

MASK, TILES = "mask", "tiles"
MODELS = (("gpt_oss_20b", 8), ("gemma3_1b", 1))
"""And their tensor-parallel sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Shapes of one windowed layer on one rank."""

    model: str
    tp_size: int
    window: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    has_sinks: bool
    scale: float | None


def describe_layer(model: ModelConfig, tp_size: int) -> Case:
    assert model.sliding_window is not None
    return Case(
        model=model.name,
        tp_size=tp_size,
        window=model.sliding_window,
        num_heads=model.num_heads // tp_size,
        num_kv_heads=max(1, model.num_query_groups // tp_size),
        head_size=model.head_dim,
        has_sinks=model.architecture.attention_sinks,
        scale=model.attention_scale,
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """Its core and a row's queries, keys and values."""

    core: SdpaAttention
    inputs: tuple[torch.Tensor, ...]

    def forward_backward(self, mask: torch.Tensor | Tiles) -> float:
        """Seconds."""
        device = self.inputs[0].device
        started = read_clock(device)
        output = self.core(*self.inputs, mask)
        torch.autograd.grad(output, self.inputs, torch.ones_like(output))
        return read_clock(device) - started

    def count_kept_bytes(self, mask: torch.Tensor | Tiles) -> int:
        """What forward keeps for backward, without the mask, of which a microbatch has one for all layers."""
        with open_activation_ledger(lambda: [get_bias(mask)]) as ledger:
            output = self.core(*self.inputs, mask)
        del output
        return ledger.peak_bytes


def build_layer(case: Case, seq_len: int, device: torch.device, dtype: torch.dtype) -> Layer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.num_heads * case.head_size,
        num_attention_heads=case.num_heads,
        kv_channels=case.head_size,
        attention_dropout=0.0,
        softmax_scale=case.scale,
        params_dtype=dtype,
    )
    core = (SinkAttention if case.has_sinks else SdpaAttention)(config)
    if isinstance(core, SinkAttention):
        torch.nn.init.normal_(core.sinks)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    shapes = [(seq_len, 1, number, case.head_size) for number in heads]
    inputs = tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    return Layer(core.to(device), inputs)


def get_bias(mask: torch.Tensor | Tiles) -> torch.Tensor:
    return mask.bias if isinstance(mask, Tiles) else mask


def read_clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(case: Case, *, seq_len: int, num_rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    layer, row = build_layer(case, seq_len, device, dtype), torch.zeros(1, seq_len, dtype=torch.int64, device=device)
    masks = {
        MASK: compute_attention_bias(row, dtype, case.window),
        TILES: compute_window_mask(row, dtype, case.window),
    }
    samples: dict[str, list[float]] = {name: [] for name in masks}
    for round_ in range(num_rounds + 1):  # the first is not counted
        for name in (MASK, TILES) if round_ % 2 == 0 else (TILES, MASK):
            seconds = layer.forward_backward(masks[name])
            if round_ > 0:
                samples[name].append(seconds)
    ratios = [masked / tiled for masked, tiled in zip(samples[MASK], samples[TILES], strict=True)]
    return {
        **asdict(case),
        "tile": list(get_bias(masks[TILES]).shape[-2:]),
        "seconds": {name: asdict(compute_spread(values)) for name, values in samples.items()},
        "mask/tiles": asdict(compute_spread(ratios)),
        "kept_bytes": {name: layer.count_kept_bytes(mask) for name, mask in masks.items()},
        "mask_bytes": {name: get_bias(mask).nbytes for name, mask in masks.items()},
        "samples": samples,
    }


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["model        window  mask, s  tiles, s  mask : tiles (quartiles)"]
    for row in rows:
        ratio, seconds = row["mask/tiles"], row["seconds"]
        lines.append(
            f"{row['model']:<12} {row['window']:>6} {seconds[MASK]['median']:>8.3f} {seconds[TILES]['median']:>9.3f}"
            f"  {ratio['median']:.2f} ({ratio['p25']:.2f}-{ratio['p75']:.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--num-rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        use_cpu_stand_ins(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    cases = [describe_layer(compose_config([f"model={name}", "data=fake"]).model, tp_size) for name, tp_size in MODELS]
    options = {"seq_len": args.seq_len, "num_rounds": args.num_rounds}
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {
        "created": created,
        "environment": describe_environment(),
        "dtype": args.dtype,
        "clock": "CPU seconds" if device.type == "cpu" else "seconds",
        **options,
        "rows": [measure(case, **options, device=device, dtype=dtype) for case in cases],
    }
    print(format_rows(record["rows"]))
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
