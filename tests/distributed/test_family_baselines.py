"""The paper's other baselines on every family: gradients against transformers and one process, files, generation."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_baselines
import test_prefix_runs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_files import tokenizer_directory
from family_toy import read_family_config, write_family_checkpoint
from hf_toy import draw_tokens
from processes import run_distributed
from test_baselines import call, run_training
from test_family_gradients import MODELS, run_case
from test_parity import TOLERANCE, compute_error
from tiers import exhaustive
from toy import Case, reduce_gradients
from transformers import AutoModelForCausalLM

from lora_dist.batch import Batch
from lora_dist.bottleneck.spec import BottleneckSpec, build_bottleneck_specs
from lora_dist.bottleneck_config import BottleneckConfig
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, TopologyConfig
from lora_dist.lora.dropout import DropoutClock
from lora_dist.mcore.bottlenecks import apply_bottlenecks
from lora_dist.mcore.hf_weights import fill_base
from lora_dist.mcore.model import build_model
from lora_dist.mcore.parallel import build_topology
from lora_dist.mcore.schedule import forward_backward

METHODS = ["adapter_h", "adapter_l", "prefix_layer", "lora_prefix_embed"]
TOPOLOGIES = [{"tp_size": 4, "sequence_parallel": True}, {"tp_size": 2, "pp_size": 2, "recompute": "full"}]
BOTTLENECK = BottleneckConfig(size=3, activation="gelu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3_text", "opt", "deepseek_v3", *exhaustive("qwen3_next", "olmo3", "granite")],
)
def test_gradients_equal_one_process(name: str, method: str) -> None:
    targets = {"deepseek_v3": ["q_a_proj", "kv_b_proj"], "qwen3_next": ["in_proj_qkvz", "v_proj"]}
    targets = targets.get(name, ["q_proj", "v_proj"])
    case = Case(model=MODELS[name], method=method, lora=LoraConfig(rank=2, target_modules=targets))
    expected_loss, expected = run_case(case)
    for options in TOPOLOGIES:
        loss, actual = run_case(replace(case, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert actual.keys() == expected.keys()
        assert compute_error(actual, expected) < TOLERANCE


def draw_like_ours(method: str, base: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every bottleneck, by the bottleneck's name, none zero; in fp64."""
    drawn = {}
    for number, spec in enumerate(build_bottleneck_specs(method, BOTTLENECK, read_family_config(base))):
        generator = torch.Generator().manual_seed(number)
        drawn[spec.name] = {
            key: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
            for key, shape in spec.shapes.items()
        }
    return drawn


def build_batch() -> Batch:
    tokens = draw_tokens()
    shape = tokens[:, 1:].shape
    return Batch(
        input_ids_BS=tokens[:, :-1],
        labels_BS=tokens[:, 1:],
        loss_mask_BS=torch.ones(shape, dtype=torch.bool),
        position_ids_BS=torch.arange(shape[1]).expand(shape),
        row_blocks=None,
        row_ids_B=torch.arange(shape[0]),
        num_loss_tokens=shape.numel(),
        num_tokens=shape.numel(),
    )


def compute_ours(method: str, base: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = read_family_config(base)
    topology = build_topology(TopologyConfig(), device=torch.device("cpu"), local_rank=dist.get_rank(), seed=0)
    gpt = build_model(model, topology, dtype=torch.float64, clock=DropoutClock())
    fill_base(gpt, model, seed=0)
    values = draw_like_ours(method, base)
    trainable = apply_bottlenecks(gpt, build_bottleneck_specs(method, BOTTLENECK, model), init_std=0.1, seed=0)
    for one in trainable:
        name, _, key = one.name.rpartition(".")
        one.parameter.data = values[name][key]
    loss, _ = forward_backward(gpt, [build_batch()], seed=0, step=0, scale_loss=None)
    return loss, reduce_gradients(trainable, topology)


def add_bottleneck(spec: BottleneckSpec, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The papers' formula."""
    normed = x
    if spec.norm_epsilon is not None:
        normed = F.layer_norm(x, x.shape[-1:], values["norm_weight"], values["norm_bias"], spec.norm_epsilon)
    inner = F.gelu(normed @ values["down_weight"].t() + values["down_bias"])
    return x + inner @ values["up_weight"].t() + values["up_bias"]


def replace_first(add: Callable[[torch.Tensor], torch.Tensor], _m: object, _i: object, output: Any) -> Any:
    """A forward hook: a sublayer's output is its tensor, or a tuple that begins with it."""
    return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)


def compute_with_transformers(method: str, base: Path) -> tuple[float, dict[str, torch.Tensor]]:
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    values, batch = draw_like_ours(method, base), build_batch()
    for spec in build_bottleneck_specs(method, BOTTLENECK, read_family_config(base)):
        layer = causal.model.layers[spec.layer]
        module = {"attention": layer.self_attn, "mlp": layer.mlp, "block": layer}[spec.place]
        for value in values[spec.name].values():
            value.requires_grad_()
        module.register_forward_hook(partial(replace_first, partial(add_bottleneck, spec, values[spec.name])))
    logits = causal(batch.input_ids_BS).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BS.flatten())
    loss.backward()
    gradients = {f"{name}.{key}": one.grad for name, each in values.items() for key, one in each.items()}
    return loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize(("name", "method"), [("llama", "adapter_h"), ("qwen3", "adapter_l")])
def test_bottlenecks_gradients_are_those_of_transformers(name: str, method: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    expected_loss, expected = compute_with_transformers(method, tmp_path)
    ((loss, actual),) = run_distributed(compute_ours, 1, method, tmp_path)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # transformers computes norms and angles in fp32
    assert actual.keys() == expected.keys()
    assert compute_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "method"), [*exhaustive(("llama", "prefix_layer"), ("qwen2", "adapter_h")), ("opt", "adapter_l")]
)
def test_a_run_trains_and_generates_as_it_trained(family: str, method: str, tmp_path: Path) -> None:
    source = test_prefix_runs if method.startswith("prefix") else test_baselines
    model = [f"model.family={family}", "model.tied_output=false"]
    words, run_dir = [*source.RUN, *model, f"method={method}"], tmp_path / "run"
    run_distributed(run_training, 2, [*words, "topology=tp2_sp", f"run_dir={run_dir}"])
    config = compose_config([*words, "topology=single"])
    (expected,) = run_distributed(source.generate_greedily, 1, config, run_dir / "adapter")
    assert expected
    command = [
        "generate",
        *test_baselines.MODEL,
        *model,
        f"model.tokenizer={tokenizer_directory()}",
        f"adapter={run_dir}",
    ]
    command += [f"generate.prompt={source.PROMPT!r}", "generate.max_new_tokens=6", "topology=tp2"]
    assert run_distributed(call, 2, [*command, f"generate.output={tmp_path / 'texts'}"]) == [0, 0]
    assert json.loads((tmp_path / "texts").read_text())["text"] == expected
