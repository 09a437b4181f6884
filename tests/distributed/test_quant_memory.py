"""What a quantised base holds: its shard to the byte, no more for backward than a native one, little while it loads."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from allocations import find_peaks
from processes import run_distributed
from torch.profiler import ProfilerActivity, profile
from toy import MODEL, Case, build_batches, build_case

from lora_dist.config import LoraConfig, ModelConfig, TopologyConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.base_parameters import initialize_base
from lora_dist.mcore.layers import LoraColumnParallelLinear, LoraRowParallelLinear
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.ledger import open_activation_ledger
from lora_dist.needed_bytes import compute_format_savings
from lora_dist.plan.search import compute_weight_bytes
from lora_dist.quant.weight import find_quantized

WIDE = replace(MODEL, hidden_size=256, ffn_hidden_size=1024)


def count_shard_bytes(model: ModelConfig, options: dict) -> tuple[int, int]:
    """Of all weights of this shard, and of its quantised ones."""
    topology = build_topology(TopologyConfig(**options), device=torch.device("cpu"), local_rank=dist.get_rank(), seed=1)
    gpt = build_model(model, topology, dtype=torch.bfloat16, recompute="none", clock=DropoutClock())
    total = sum(tensor.nbytes for tensor in (*gpt.parameters(), *gpt.buffers()))
    return total, sum(weight.nbytes for weight in find_quantized(gpt))


@pytest.mark.parametrize(
    ("base_format", "options"),
    [
        ("native", {"tp_size": 2}),
        ("nf4", {}),
        ("nf4_double", {}),
        ("nf4_double", {"tp_size": 2, "pp_size": 2}),
        ("fp8", {"tp_size": 2}),
    ],
    ids=str,
)
def test_a_shard_is_as_large_as_computed(base_format: str, options: dict) -> None:
    model, world_size = replace(WIDE, base_format=base_format), options.get("tp_size", 1) * options.get("pp_size", 1)
    sizes = run_distributed(count_shard_bytes, world_size, model, options)
    tp_size, pp_size = options.get("tp_size", 1), options.get("pp_size", 1)
    assert max(total for total, _ in sizes) == compute_weight_bytes(model, "bf16", tp_size=tp_size, pp_size=pp_size)
    if base_format != "native":
        num_weights = WIDE.num_layers * (4 * 256 * 256 + 2 * 256 * 1024)
        bits = {"nf4": 4.5, "fp8": 8.5, "nf4_double": 4.125 + 64 / (64 * 256)}[base_format]
        stored = sum(quantized for _, quantized in sizes)
        # A column-parallel row of 256 has 4 scales to share a range, not 256.
        columns = WIDE.num_layers * (3 * 256 * 256 + 256 * 1024) if base_format == "nf4_double" else 0
        assert 8 * stored == bits * num_weights + columns * (1 / 4 - 1 / 256)
        saved = compute_format_savings(model, 2, tp_size, range(model.num_layers // pp_size))
        assert saved * world_size == 2 * num_weights - stored


def measure_saved(base_format: str, lora: LoraConfig, recompute: str) -> int:
    case = Case(model=replace(WIDE, base_format=base_format), lora=lora, dtype=torch.float32, recompute=recompute)
    gpt, _, topology = build_case(case)
    with open_activation_ledger(gpt.parameters) as ledger:
        forward_backward(gpt, build_batches(topology), seed=0, step=0, scale_loss=None)
    return ledger.peak_bytes


@pytest.mark.parametrize(
    ("targets", "recompute"), [(["q_proj", "v_proj"], "none"), (["all"], "none"), (["all"], "full")], ids=str
)
def test_backward_keeps_no_more_than_over_native_weights(targets: list[str], recompute: str) -> None:
    lora = LoraConfig(rank=3, target_modules=targets)
    native, *quantized = (
        run_distributed(measure_saved, 1, base_format, lora, recompute)[0] for base_format in ("native", "nf4", "fp8")
    )
    assert native > 0
    assert all(saved <= native for saved in quantized)


def measure_loading(base_format: str) -> tuple[int, int]:
    """Bytes at the peak of building and filling the model; of its linears' weights were they native."""
    model = replace(WIDE, num_layers=24, base_format=base_format)
    topology = build_topology(TopologyConfig(), device=torch.device("cpu"), local_rank=0, seed=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gpt = build_model(model, topology, dtype=torch.float32, recompute="none", clock=DropoutClock())
        initialize_base(gpt, model, seed=0)
    linears = [m for m in gpt.modules() if isinstance(m, LoraColumnParallelLinear | LoraRowParallelLinear)]
    return find_peaks(profiler).all, sum(4 * linear.weight.shape.numel() for linear in linears)


def test_loading_never_holds_the_native_shard() -> None:
    peak, native = run_distributed(measure_loading, 1, "nf4")[0]
    assert peak < 0.5 * native
    native_peak, _ = run_distributed(measure_loading, 1, "native")[0]
    assert native_peak > native, "the instrument must see a native shard"
