"""Adapters merged, taken out and exchanged on a live sharded model: what it computes, what comes back, its cost."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_toy import (
    build_shard,
    compute_hf_logits,
    compute_logits,
    compute_peft_logits,
    count_processes,
    draw_adapter_values,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_distributed
from safetensors.torch import load_file

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, load_shards
from lora_dist.mcore.model import ShardedGpt
from lora_dist.measure.collectives import count_collectives

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FIRST = LoraConfig(rank=3, target_modules=["q_proj", "v_proj", "down_proj"], bias="all")
SECOND = LoraConfig(rank=5, target_modules=["v_proj", "o_proj", "up_proj"], layers=[0, 2])
EVERY = LoraConfig(rank=2, target_modules=ALL)
TOPOLOGIES = [
    {},
    {"tp_size": 2},
    {"tp_size": 4},
    {"tp_size": 2, "pp_size": 2},
    {"tp_size": 2, "sequence_parallel": True},
]


def draw(model: ModelConfig, lora: LoraConfig) -> tuple[list[AdapterSpec], dict[str, torch.Tensor]]:
    specs = build_adapter_specs(lora, model)
    values = draw_adapter_values(specs, model, lora.bias)
    return specs, {name: value * (1 + 0.1 * lora.rank) for name, value in values.items()}


def open_toy(options: dict, base: Path, dtype: torch.dtype = torch.float32) -> tuple[ShardedGpt, list[LoadedAdapter]]:
    model = read_toy_config(base)
    gpt = build_shard(options, model, dtype)
    load_hf_checkpoint(gpt, base)
    gpt.requires_grad_(False)
    return gpt, [load_shards(gpt, f"task{lora.rank}", *draw(model, lora)) for lora in (FIRST, SECOND, EVERY)]


def attach(gpt: ShardedGpt, adapter: LoadedAdapter | None) -> None:
    """The adapter beside the weights, unmerged."""
    for name, shard in ({} if adapter is None else adapter.shards).items():
        gpt.get_submodule(name).lora = shard


def detach(gpt: ShardedGpt, adapter: LoadedAdapter) -> None:
    for name in adapter.shards:
        gpt.get_submodule(name).lora = None


def merge_and_compute(options: dict, base: Path) -> list[torch.Tensor | None]:
    """Logits of the base, of EVERY beside it, of EVERY and SECOND merged, and of the base again."""
    gpt, (_, second, every) = open_toy(options, base)
    live, logits = LiveMerge(gpt), [compute_logits(gpt)]
    attach(gpt, every)
    logits.append(compute_logits(gpt))
    detach(gpt, every)
    for adapter in (every, second):
        live.merge(adapter)
        assert live.merged == adapter.name
        logits.append(compute_logits(gpt))
    live.unmerge()
    return [*logits, compute_logits(gpt)]


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
def test_merged_computes_what_the_adapter_beside_the_base_does(options: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    results = run_distributed(merge_and_compute, count_processes(options), options, tmp_path)
    base, beside, merged, switched, again = next(logits for logits in results if logits[0] is not None)
    assert torch.equal(base, again)
    assert (merged - base).abs().max() > 0.1 * base.abs().max()
    assert (merged - beside).abs().max() < 1e-5 * beside.abs().max()
    assert (switched - merged).abs().max() > 0.1 * base.abs().max()


def cycle(options: dict, base: Path, dtype: torch.dtype) -> None:
    """Three rounds of A -> B -> C -> base: every bit and every address as before; switching equals a fresh merge."""
    gpt, adapters = open_toy(options, base, dtype)
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    addresses = {name: parameter.data_ptr() for name, parameter in gpt.named_parameters()}
    live, fresh = LiveMerge(gpt), {}
    for adapter in adapters:
        live.merge(adapter)
        fresh[adapter.name] = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
        live.unmerge()
        assert live.kept_bytes == 0
    for _ in range(3):
        for adapter in adapters:
            live.merge(adapter)
            for name, parameter in gpt.named_parameters():
                assert torch.equal(parameter, fresh[adapter.name][name]), name
        live.unmerge()
        for name, parameter in gpt.named_parameters():
            assert torch.equal(parameter, before[name]), name
            assert parameter.data_ptr() == addresses[name]
    dist.barrier()  # nothing else here waits for the other process to have joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmerging_gives_the_base_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, dtype=dtype)
    run_distributed(cycle, 2, {"tp_size": 2}, tmp_path, dtype)


def count_and_weigh(options: dict, base: Path) -> tuple[int, int]:
    """Collectives of a merge and an unmerge; bytes kept in between."""
    gpt, (first, *_) = open_toy(options, base)
    live = LiveMerge(gpt)
    with count_collectives(gpt.topology) as counter:
        live.merge(first)
        kept = live.kept_bytes
        live.unmerge()
    dist.barrier()  # nothing else here waits for the other process to have joined
    return len(counter.read()), kept


def test_merging_communicates_nothing_and_keeps_the_adapted_rows_alone(tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path)
    h, f, biases = model.hidden_size, model.ffn_hidden_size, 0
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        biases += tensor.numel() // (2 if "c_attn" in name or "c_fc" in name else 1) if name.endswith("bias") else 0
    weights = model.num_layers * (2 * h * h + h * f) // 2
    for calls, kept in run_distributed(count_and_weigh, 2, {"tp_size": 2}, tmp_path):
        assert (calls, kept) == (0, 4 * (weights + biases))


def write_merged(options: dict, base: Path, target: Path) -> None:
    gpt, (first, *_) = open_toy(options, base)
    LiveMerge(gpt, keep_base=False).merge(first)
    write_hf_checkpoint(gpt, target, model=read_toy_config(base))


def test_a_merged_checkpoint_is_the_same_at_every_topology(tmp_path: Path) -> None:
    """transformers loads it, and computes what PEFT does with the adapter beside the base."""

    base = tmp_path / "base"
    model = write_toy_checkpoint(base)
    specs, values = draw(model, FIRST)
    write_adapter_directory(
        tmp_path / "adapter", Adapter(specs=specs, bias="all", values=values), model, {}, base_fingerprint="base"
    )
    expected = compute_peft_logits(base, tmp_path / "adapter")
    reference = None
    for index, options in enumerate(TOPOLOGIES):
        target = tmp_path / f"merged{index}"
        run_distributed(write_merged, count_processes(options), options, base, target)
        assert (compute_hf_logits(target) - expected).abs().max() < 1e-5 * expected.abs().max()
        written = load_file(target / "model.safetensors")
        reference = reference or written
        for name, tensor in written.items():
            assert (tensor - reference[name]).abs().max() < 1e-6, name
