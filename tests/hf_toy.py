"""Tiny random GPT-2 checkpoints written by transformers, and what transformers, PEFT and the shards make of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.config import (
    BenchConfig,
    CompareConfig,
    DataConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TopologyConfig,
    TrackConfig,
    ZeroConfig,
)
from lora_dist.files.hf_checkpoint import read_model_fields
from lora_dist.files.peft_layout import compute_factor_shapes
from lora_dist.lora.dropout import DropoutClock
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.trained_base import list_trained_base
from lora_dist.mcore.model import ShardedGpt, build_model
from lora_dist.mcore.parallel import build_topology

VOCAB_SIZE = 101
"""Divides by no tp_size, and is padded at each."""


def build_hf_model(seed: int = 0) -> GPT2LMHeadModel:
    """Four layers, eval mode, every parameter drawn: transformers leaves biases zero and norms one."""
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=32, n_embd=32, n_layer=4, n_head=4, n_inner=48)
    config.bos_token_id = config.eos_token_id = 100
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + drawn if ".ln_" in name and name.endswith("weight") else drawn)
    return model.eval()


def write_toy_checkpoint(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> ModelConfig:
    """transformers' own files of the toy model; its configuration here."""
    build_hf_model(seed).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return read_toy_config(directory)


def read_toy_config(directory: Path) -> ModelConfig:
    return ModelConfig(**read_model_fields(directory) | {"hidden_dropout": 0.0, "attention_dropout": 0.0})


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def draw_tokens() -> torch.Tensor:
    """[B, S] = [2, 16]."""
    return torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def compute_hf_logits(directory: Path) -> torch.Tensor:
    """[B, S, V], fp32."""
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()
    return model(draw_tokens()).logits


def build_run_config(model: ModelConfig, lora: LoraConfig | None = None, **options: object) -> RunConfig:
    """A whole configuration around the parts that a test is about."""
    parts = {
        "method": "lora",
        "topology": TopologyConfig(),
        "zero": ZeroConfig(),
        "data": DataConfig(name="fake", format="fake", seq_len=16),
        "optim": OptimConfig(),
        "loop": LoopConfig(),
        "track": TrackConfig(backend="none"),
        "compare": CompareConfig(),
        "bench": BenchConfig(),
        "run_dir": "unused",
    }
    return RunConfig(model=model, lora=lora or LoraConfig(), **parts | options)  # type: ignore[arg-type]


def draw_adapter_values(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Whole fp32 factors, biases and modules by canonical name, B not zero."""
    generator = torch.Generator().manual_seed(11)
    values = {}
    for name, shape in compute_factor_shapes(specs, model).items():
        is_factor = name.endswith((".lora_A", ".lora_B"))
        drawn = torch.randn(shape, generator=generator) if is_factor else torch.rand(shape, generator=generator)
        values[name] = 0.2 * drawn if is_factor else 0.5 + drawn
    shapes = compute_canonical_shapes(model)
    for name in list_trained_base(specs, model, bias, modules):
        values[name] = torch.randn(shapes[name], generator=generator)
    return values


@torch.no_grad()
def compute_peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """[B, S, V]: PEFT's own reading of the adapter over transformers' reading of the base."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32), adapter)
    return model.eval()(draw_tokens()).logits


def count_processes(options: dict) -> int:
    return options.get("tp_size", 1) * options.get("pp_size", 1) * options.get("dp_size", 1)


def build_shard(options: dict, model: ModelConfig, dtype: torch.dtype = torch.float32) -> ShardedGpt:
    topology = build_topology(TopologyConfig(**options), device=torch.device("cpu"), local_rank=dist.get_rank(), seed=1)
    return build_model(model, topology, dtype=dtype, clock=DropoutClock())


@torch.no_grad()
def compute_logits(gpt: ShardedGpt, tokens_BS: torch.Tensor | None = None) -> torch.Tensor | None:
    """[B, S, V] on the last stage, gathered over TP, without the padded vocabulary; stages hand over by broadcast."""
    topology, tokens_BS = gpt.topology, draw_tokens() if tokens_BS is None else tokens_BS
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    local_len = tokens_BS.shape[1] // (topology.tp_size if topology.sequence_parallel else 1)
    output = torch.empty(local_len, tokens_BS.shape[0], gpt.config.hidden_size, dtype=gpt.config.params_dtype)
    gpt.eval()
    for pp_rank in range(topology.pp_size):
        if pp_rank == topology.pp_rank:
            gpt.set_input_tensor(output)
            output = gpt(tokens_BS, positions_BS, None)
        if pp_rank < topology.pp_size - 1:
            dist.broadcast(output, group=topology.pp_group, group_src=pp_rank)
    if not topology.is_last_stage:
        return None
    parts = [torch.empty_like(output) for _ in range(topology.tp_size)]
    dist.all_gather(parts, output.contiguous(), group=topology.tp_group)
    logits = torch.cat(parts, -1)
    assert (logits[..., VOCAB_SIZE:] == 0).all()
    return logits[..., :VOCAB_SIZE]
