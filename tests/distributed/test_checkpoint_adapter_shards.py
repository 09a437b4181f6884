"""One adapter file from every topology, and back into any other; PEFT's logits are the shards' own."""

from pathlib import Path

import pytest
import torch
from hf_toy import (
    build_run_config,
    build_shard,
    compute_logits,
    compute_peft_logits,
    count_processes,
    draw_adapter_values,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_distributed
from safetensors.torch import load_file
from tiers import exhaustive

from lora_dist.checkpoint.adapter import load_adapter, write_adapter
from lora_dist.config import LoraConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter
from lora_dist.whole import cut_shard, read_value

TOPOLOGIES = [
    {},
    {"tp_size": 2},
    {"tp_size": 4},
    {"pp_size": 2},
    {"tp_size": 2, "pp_size": 2},
    {"tp_size": 2, "dp_size": 2},
    {"tp_size": 2, "sequence_parallel": True},
]
LORA = LoraConfig(
    rank=3, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], bias="all", rank_pattern={"o": 5}
)
LAYER_SUBSET = LoraConfig(rank=1, target_modules=["v_proj"], layers=["3"])


def build_adapted(options: dict, base: Path, lora: LoraConfig) -> tuple[ShardedGpt, list[TrainableParameter]]:
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    return gpt, apply_lora(gpt, build_adapter_specs(lora, model), bias=lora.bias, seed=0)


def write_and_compute(options: dict, base: Path, target: Path, lora: LoraConfig) -> torch.Tensor | None:
    gpt, trainable = build_adapted(options, base, lora)
    config = build_run_config(read_toy_config(base), lora)
    specs = build_adapter_specs(lora, config.model)
    values = draw_adapter_values(specs, config.model, lora.bias)
    with torch.no_grad():
        for one in trainable:
            one.parameter.copy_(cut_shard(values[one.name], one, gpt.topology))
    write_adapter(
        target,
        trainable=trainable,
        specs=specs,
        topology=gpt.topology,
        model=config.model,
        bias=lora.bias,
        read=read_value,
        base_fingerprint="base",
        task="toy",
        step=7,
        metrics={"valid_loss": 1.0},
    )
    return compute_logits(gpt)


def load_and_compute(options: dict, base: Path, adapter: Path, lora: LoraConfig) -> torch.Tensor | None:
    gpt, trainable = build_adapted(options, base, lora)
    config = build_run_config(read_toy_config(base), lora)
    manifest = load_adapter(
        adapter,
        trainable=trainable,
        specs=build_adapter_specs(lora, config.model),
        topology=gpt.topology,
        model=config.model,
        bias=lora.bias,
        base_fingerprint="base",
    )
    assert manifest["step"] == 7
    return compute_logits(gpt)


@pytest.mark.parametrize("lora", [*exhaustive(LORA), LAYER_SUBSET], ids=["five_targets", "one_layer"])
def test_every_topology_writes_and_reads_the_same_adapter(lora: LoraConfig, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = write_toy_checkpoint(base)
    values = draw_adapter_values(build_adapter_specs(lora, model), model, lora.bias)
    assert values
    written = []
    for index, options in enumerate(TOPOLOGIES):
        target = tmp_path / f"adapter{index}"
        results = run_distributed(write_and_compute, count_processes(options), options, base, target, lora)
        written.append(next(logits for logits in results if logits is not None))
        files = {path.name for path in target.iterdir()}
        assert files == {"adapter_model.safetensors", "adapter_config.json", "manifest.json"}
        raw = (target / "adapter_model.safetensors").read_bytes()
        assert raw == (tmp_path / "adapter0" / "adapter_model.safetensors").read_bytes()
    expected = compute_peft_logits(base, tmp_path / "adapter0")
    for logits in written:
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for options, logits in zip(TOPOLOGIES[1:6], written[1:6], strict=True):
        results = run_distributed(
            load_and_compute, count_processes(options), options, base, tmp_path / "adapter0", lora
        )
        assert all(torch.equal(result, logits) for result in results if result is not None)


def test_writing_again_replaces_the_old_one(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "adapter"
    write_toy_checkpoint(base)
    target.mkdir()
    (target / "old").write_text("replaced")
    run_distributed(write_and_compute, 1, {}, base, target, LAYER_SUBSET)
    assert not (target / "old").exists()
    assert len(load_file(target / "adapter_model.safetensors")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
