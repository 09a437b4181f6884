"""A GPU trains what a CPU trains: losses and trained parameters of a few steps; skipped without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.batch import Batch
from lora_dist.bench.batches import build_batches
from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.run import build_engine, open_job

NUM_STEPS = 4
OVERRIDES = [
    *("model=tiny", "data=fake", "data.seq_len=64", "track=none", "loop.micro_batch_size=4"),
    *("loop.global_batch_size=8", "lora.rank=4", "lora.target_modules=[all]", "optim.lr=1e-2", "optim.eps=1e-3"),
]
EXPERTS = [
    *("model.family=mixtral", "model.num_experts=4", "model.experts_per_token=2", "model.tied_output=false"),
    "lora.target_modules=[all,gate_proj,up_proj,down_proj]",
]
LATENT = [
    *("model.family=deepseek_v3", "model.head_size=32", "model.query_latent_size=64", "model.kv_latent_size=64"),
    *("model.rope_head_size=16", "model.value_head_size=24", "model.rope_interleaved=true", "model.tied_output=false"),
    *("model.num_experts=4", "model.experts_per_token=2", "model.num_expert_groups=2", "model.groups_per_token=1"),
    *("model.shared_ffn_size=64", "model.num_dense_layers=1", "model.dense_ffn_size=128"),
    "lora.target_modules=[all,gate_proj,up_proj,down_proj]",
]
WHOLE = [
    *("model.family=minimax_m2", "model.num_kv_heads=2", "model.rotary_fraction=0.5", "model.num_experts=4"),
    *("model.experts_per_token=2", "model.tied_output=false", "lora.target_modules=[all,gate_proj,down_proj]"),
]
SINKS = [
    *("model.family=gpt_oss", "model.num_kv_heads=2", "model.sliding_window=9", "model.full_attention_layers=[1]"),
    *("model.num_experts=4", "model.experts_per_token=2", "model.swiglu_alpha=1.702", "model.swiglu_limit=7"),
    *("model.tied_output=false", "lora.target_modules=[all,gate_proj,up_proj,down_proj]"),
]
DELTA = [
    *("model.family=qwen3_next", "model.num_kv_heads=2", "model.head_size=32", "model.rotary_fraction=0.5"),
    *("model.full_attention_layers=[1]", "model.delta_key_heads=2", "model.delta_value_heads=4"),
    *("model.delta_key_size=16", "model.delta_value_size=24", "model.delta_kernel_size=4", "model.num_experts=4"),
    *("model.experts_per_token=2", "model.shared_ffn_size=64", "model.tied_output=false"),
    "lora.target_modules=[all,gate_proj,up_proj,down_proj]",
]
SCALED = [
    *("model.family=granite", "model.embedding_multiplier=12", "model.residual_multiplier=0.2"),
    "model.logits_divisor=8",
]
GROWING = [
    *("model.family=ministral3", "model.query_growth=0.1"),
    "model.rope_scaling={factor:2,beta_fast:32,beta_slow:1,attention_factor:1,original_max_position_embeddings:8}",
]
CASES = {
    "lora": ([], 1e-5),
    "lora-recompute": (["loop.recompute=full"], 1e-5),
    "lora-dropout": (["lora.dropout=0.1"], 1e-5),
    "lora-compiled": (["compile=true", "lora.dropout=0.1"], 1e-5),
    "llama-compiled": (["compile=true", "model.family=llama"], 1e-5),
    "lora-graphs": (["cuda_graphs=true", "lora.dropout=0.1"], 1e-5),
    "lora-graphs-compiled": (["cuda_graphs=true", "compile=true"], 1e-5),
    "llama-graphs-fp16": (["cuda_graphs=true", "model.family=llama", "dtype=fp16"], 5e-3),
    "full": (["method=full", "optim.lr=1e-3"], 1e-5),
    "full-graphs-bf16": (["method=full", "optim.lr=1e-3", "cuda_graphs=true", "dtype=bf16"], 2e-2),
    "bitfit": (["method=bitfit"], 1e-5),
    "adapter_h": (["method=adapter_h"], 1e-5),
    "dora": (["method=dora"], 1e-5),
    "nf4": (["model.base_format=nf4"], 1e-5),
    "fp8": (["model.base_format=fp8"], 1e-5),
    "packed-blocks": (["packed_attention=blocks"], 1e-5),
    "packed-mask": (["packed_attention=mask"], 1e-5),
    "packed-llama-blocks": (["packed_attention=blocks", "model.family=llama", "model.num_kv_heads=2"], 1e-5),
    "packed-llama-blocks-bf16": (["packed_attention=blocks", "model.family=llama", "dtype=bf16"], 2e-2),
    "packed-graphs": (["cuda_graphs=true"], 1e-5),
    "experts": (EXPERTS, 1e-5),
    "experts-nf4": ([*EXPERTS, "model.base_format=nf4"], 1e-5),
    "experts-nf4-bf16": ([*EXPERTS, "model.base_format=nf4", "dtype=bf16"], 2e-2),
    "experts-full": ([*EXPERTS, "method=full", "optim.lr=1e-3"], 1e-5),
    "experts-bf16": ([*EXPERTS, "dtype=bf16"], 2e-2),
    "latent": (LATENT, 1e-5),
    "latent-bf16": ([*LATENT, "dtype=bf16"], 2e-2),
    "whole-norms": (WHOLE, 1e-5),
    "whole-norms-compiled": ([*WHOLE, "compile=true"], 1e-5),
    "whole-norms-bf16": ([*WHOLE, "dtype=bf16"], 2e-2),
    "whole-norms-full": ([*WHOLE, "method=full", "optim.lr=1e-3"], 1e-5),
    "olmo2": (["model.family=olmo2", "model.num_kv_heads=2"], 1e-5),
    "olmo2-graphs-bf16": (["model.family=olmo2", "cuda_graphs=true", "dtype=bf16"], 2e-2),
    "granite": (SCALED, 1e-5),
    "granite-compiled": ([*SCALED, "compile=true"], 1e-5),
    "granite-graphs-bf16": ([*SCALED, "cuda_graphs=true", "dtype=bf16"], 2e-2),
    "ministral3": (GROWING, 1e-5),
    "ministral3-bf16": ([*GROWING, "dtype=bf16"], 2e-2),
    "smollm3-graphs": (["model.family=smollm3", "model.unturned_layers=[1]", "cuda_graphs=true"], 1e-5),
    "sinks": (SINKS, 1e-5),
    "sinks-compiled": ([*SINKS, "compile=true"], 1e-5),
    "sinks-bf16": ([*SINKS, "dtype=bf16"], 2e-2),
    "sinks-full": ([*SINKS, "method=full", "optim.lr=1e-3"], 1e-5),
    "sinks-full-bf16": ([*SINKS, "method=full", "optim.lr=1e-3", "dtype=bf16"], 2e-2),
    "sinks-mxfp4-bf16": ([*SINKS, "model.base_format=mxfp4", "dtype=bf16"], 2e-2),
    "packed-sinks-bf16": ([*SINKS, "packed_attention=blocks", "dtype=bf16"], 2e-2),
    "delta": (DELTA, 1e-5),
    "delta-compiled": ([*DELTA, "compile=true"], 1e-5),
    "delta-bf16": ([*DELTA, "dtype=bf16"], 2e-2),
    "delta-full": ([*DELTA, "method=full", "optim.lr=1e-3"], 1e-5),
    "packed-delta-blocks": ([*DELTA, "packed_attention=blocks"], 1e-5),
    "packed-delta-mask-bf16": ([*DELTA, "packed_attention=mask", "dtype=bf16"], 2e-2),
    "lora-bf16": (["dtype=bf16"], 2e-2),
    "lora-fp16": (["dtype=fp16"], 5e-3),
}
"""Overrides, and the error of the losses that rounding excuses. A CPU's half of a case is fp32 and not compiled."""
_ON_GPU = ("dtype=", "compile=", "cuda_graphs=")


def train(name: str, device: str, directory: Path) -> list[float]:
    """Losses of the steps; the trained parameters are written to `directory`."""
    overrides = [one for one in CASES[name][0] if device == "cuda" or not one.startswith(_ON_GPU)]
    config = compose_config([*OVERRIDES, *overrides, f"device={device}"])
    with open_job(config) as topology:
        engine, _ = build_engine(config, topology)
        losses = []
        for step in range(NUM_STEPS):
            batches = build_batches(config, step)
            if name.startswith("packed"):
                batches = [pack(batch) for batch in batches]
            losses.append(engine.train_step(batches, step=step, lr=config.optim.lr).loss)
        trained = {one.name: one.parameter.detach().float().cpu().contiguous() for one in engine.trainable}
    save_file(trained, directory / f"{device}.safetensors")
    return losses


def pack(batch: Batch) -> Batch:
    """Each row as two examples, their bound at another place in each row."""
    bounds = [5 + 9 * row for row in range(len(batch.input_ids_BS))]
    row_blocks = tuple((bound, batch.seq_len - bound) for bound in bounds)
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in row_blocks]
    return replace(batch, row_blocks=row_blocks, position_ids_BS=torch.stack(positions))


def train_alone(name: str, device: str, directory: Path) -> list[float]:
    environment = dict(os.environ) | {"DS_ACCELERATOR": device}
    become_single_process(environment)
    done = subprocess.run(
        [sys.executable, __file__, name, device, str(directory)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_gpu_trains_as_cpu_does(name: str, tmp_path: Path) -> None:
    expected, actual = (train_alone(name, device, tmp_path) for device in ("cpu", "cuda"))
    tolerance = CASES[name][1]
    assert actual == pytest.approx(expected, rel=tolerance)
    if tolerance <= 1e-5:  # Adam's steps are as long for a gradient of rounding alone, so half types compare losses
        on_cpu, on_gpu = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
        for key, value in on_cpu.items():
            torch.testing.assert_close(on_gpu[key], value, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(train(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
