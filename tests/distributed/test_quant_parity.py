"""Training over a quantised base on every topology against one process whose native weights have the same values."""

from dataclasses import replace

import pytest
import torch
from processes import run_alone, run_distributed
from rounding import apply_rounding
from tiers import few_of
from toy import MODEL, Case, build_batches, build_case, gather_whole

from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.lora.layer import LoraShard
from lora_dist.mcore import experts
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.collectives import Collective, count_collectives
from lora_dist.quant import weight as quant_weight
from lora_dist.zero.engine import build_zero_engine

NUM_STEPS = 3
OPTIM = OptimConfig(lr=3e-3, clip_grad_norm=0.5, weight_decay=0.1, eps=1e-3)
"""A smaller `eps` would make steps of gradients that are nothing but rounding, different on every kind of processor."""
WIDE = replace(MODEL, num_layers=2, hidden_size=128, ffn_hidden_size=256)
ADAPTERS = {
    "all": LoraConfig(rank=3, target_modules=["all"], dropout=0.2, bias="all"),
    "some": LoraConfig(rank=3, target_modules=["q_proj", "down_proj"], layers=["1"]),
    "dora": LoraConfig(rank=3, target_modules=["v_proj", "o_proj", "up_proj"], use_dora=True),
    "llama": LoraConfig(rank=3, target_modules=["k_proj", "gate_proj", "down_proj"], layers=["1"]),
    "latent": LoraConfig(rank=3, target_modules=["all"], dropout=0.2),
    "delta": LoraConfig(rank=3, target_modules=["all"], dropout=0.2),
    "experts": LoraConfig(rank=3, target_modules=["q_proj", "gate_proj", "down_proj", "shared_up_proj"]),
    "whole": LoraConfig(rank=3, target_modules=["k_proj", "o_proj", "gate_proj"]),
    "sinks": LoraConfig(rank=3, target_modules=["o_proj", "gate_proj", "down_proj"]),
}
FAMILIES = {
    "llama": {"family": "llama", "num_kv_heads": 2},
    "experts": {
        **{"family": "glm4_moe", "num_kv_heads": 2, "num_experts": 3, "experts_per_token": 2, "tied_output": False},
        **{"ffn_hidden_size": 128, "shared_ffn_size": 256, "num_dense_layers": 1, "dense_ffn_size": 384},
    },
}
FAMILIES["latent"] = {
    **FAMILIES["experts"],
    **{"family": "deepseek_v3", "num_kv_heads": None, "query_latent_size": 192, "kv_latent_size": 64},
    **{"rope_head_size": 8, "value_head_size": 32},
}
FAMILIES["delta"] = {
    **{"family": "qwen3_next", "num_kv_heads": 2, "num_experts": 3, "experts_per_token": 2, "tied_output": False},
    **{"ffn_hidden_size": 128, "shared_ffn_size": 256, "full_attention_layers": [1], "delta_key_heads": 2},
    **{"delta_value_heads": 4, "delta_key_size": 8, "delta_value_size": 32, "delta_kernel_size": 4},
}
FAMILIES["sinks"] = {
    **{"family": "gpt_oss", "num_kv_heads": 2, "num_experts": 3, "experts_per_token": 2, "tied_output": False},
    **{"ffn_hidden_size": 128, "swiglu_alpha": 1.702, "swiglu_limit": 0.2},
}
FAMILIES["whole"] = {
    **{"family": "minimax_m2", "num_kv_heads": 2, "num_experts": 3, "experts_per_token": 2, "tied_output": False},
    "ffn_hidden_size": 128,
}
FORMATS = ["nf4", "nf4_double", "fp8"]
Trained = tuple[list[float], list[float], dict[str, torch.Tensor]]


def build(adapters: str, base_format: str, **options: object) -> Case:
    model = replace(WIDE, base_format=base_format, **FAMILIES.get(adapters, {}))
    return Case(model=model, lora=ADAPTERS[adapters], dtype=torch.float32, **options)


def train(case: Case, stage: int = 1, rounded_to: str | None = None) -> Trained:
    """Losses, norms and whole trained values; B is drawn before the first step."""
    gpt, trainable, topology = build_case(case)
    if rounded_to is not None:
        apply_rounding(gpt, rounded_to)
        for linear in gpt.modules():
            if isinstance(shard := getattr(linear, "lora", None), LoraShard) and shard.use_dora:
                measure_rows_again(shard, linear.weight)
    zero = build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=stage),
        optim=OPTIM,
        micro_batch_size=1,
        dtype=case.dtype,
        topology=topology,
    )
    engine = Engine(gpt, zero, trainable, topology, seed=0)
    results = [
        engine.train_step(build_batches(topology, seed=step), step=step, lr=OPTIM.lr) for step in range(NUM_STEPS)
    ]
    engine.check_replicas()
    values = {one.name: gather_whole(zero.read_state(one)["value"], one, topology) for one in trainable}
    return [one.loss for one in results], [one.grad_norm for one in results], values


@torch.no_grad()
def measure_rows_again(shard: LoraShard, weight_OH: torch.Tensor) -> None:
    """DoRA has measured the base's rows before they were rounded; the trained lengths stay as they are."""
    kept = [shard.magnitude(spec).clone() for spec in shard.specs]
    shard.start_magnitudes(weight_OH)
    for spec, length in zip(shard.specs, kept, strict=True):
        shard.magnitude(spec).copy_(length)


def train_oracle(adapters: str, base_format: str) -> Trained:
    """Over native weights, rounded, on one process."""
    return run_alone(train, build(adapters, "native"), 1, base_format)


def assert_alike(results: list[Trained], expected: Trained) -> None:
    seen = set()
    for losses, norms, values in results:
        assert losses == pytest.approx(expected[0], abs=1e-5)
        assert norms == pytest.approx(expected[1], rel=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(value, expected[2][name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(name)
    assert seen == expected[2].keys()


EVERYTHING = {"tp_size": 2, "pp_size": 2, "sequence_parallel": True, "recompute": "full"}
GRID = [
    ("all", {"tp_size": 2}, 1),
    ("all", {"tp_size": 2, "sequence_parallel": True}, 0),
    ("all", {"pp_size": 2}, 1),
    ("all", {"dp_size": 2}, 2),
    ("all", {"recompute": "full"}, 1),
    ("all", EVERYTHING, 1),
    ("some", {"tp_size": 2}, 1),
    ("some", {"pp_size": 2}, 1),
    ("some", {"dp_size": 2}, 1),
    ("some", {"recompute": "selective"}, 1),
    ("some", EVERYTHING, 1),
    ("dora", {}, 1),
    ("dora", EVERYTHING, 1),
    ("llama", EVERYTHING, 1),
    ("experts", {"tp_size": 2}, 1),
    ("latent", {"tp_size": 2}, 1),
    ("latent", EVERYTHING, 1),
    ("experts", EVERYTHING, 1),
    ("delta", {"tp_size": 2}, 1),
    ("delta", EVERYTHING, 1),
    ("sinks", {"tp_size": 2}, 1),
    ("sinks", EVERYTHING, 1),
    ("whole", EVERYTHING, 1),
]
FEW = [case for case in GRID if case[1] == EVERYTHING and case[0] not in ("delta", "whole")]
FEW += [GRID[1], GRID[3], GRID[9]]


@pytest.mark.parametrize(
    ("adapters", "options", "stage"), few_of(GRID, *FEW), ids=lambda value: str(value).replace("'", "")
)
def test_every_topology_trains_alike(adapters: str, options: dict, stage: int) -> None:
    case = build(adapters, "nf4_double", **options)
    assert_alike(run_distributed(train, case.world_size, case, stage), train_oracle(adapters, "nf4_double"))


@pytest.mark.parametrize("adapters", ["some", "experts"])
@pytest.mark.parametrize("base_format", ["nf4", "fp8"])
@pytest.mark.parametrize("options", [{}, {"tp_size": 2, "sequence_parallel": True}], ids=str)
def test_other_formats(adapters: str, base_format: str, options: dict) -> None:
    case = build(adapters, base_format, **options)
    assert_alike(run_distributed(train, case.world_size, case), train_oracle(adapters, base_format))


@pytest.mark.parametrize("options", [{}, {"tp_size": 2, "sequence_parallel": True}, {"recompute": "full"}], ids=str)
@pytest.mark.parametrize("at_once", [3, 1])
def test_experts_are_dequantised_together_or_in_parts(
    at_once: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU in bf16; here in fp32, which is the most that the product for several experts takes."""
    oracle = train_oracle("experts", "nf4_double")
    monkeypatch.setattr(experts, "can_group", lambda *_, **__: True)
    case = build("experts", "nf4_double", **options)
    sizes = 2 * case.model.ffn_hidden_size // options.get("tp_size", 1) * case.model.hidden_size
    monkeypatch.setattr(quant_weight, "_STACK_AT_ONCE", at_once * sizes)
    assert_alike(run_distributed(train, case.world_size, case), oracle)


def test_experts_in_mxfp4_train_alike() -> None:
    """And attention over its native weights, which the format leaves as they are."""
    (oracle,) = run_distributed(train, 1, build("sinks", "native"), 1, "mxfp4")
    for options in ({}, {"tp_size": 2, "sequence_parallel": True}, EVERYTHING):
        case = build("sinks", "mxfp4", **options)
        assert_alike(run_distributed(train, case.world_size, case), oracle)
    (native,) = run_distributed(train, 1, build("sinks", "native"))
    assert abs(native[0][0] - oracle[0][0]) > 2e-5


def test_the_formats_are_told_apart() -> None:
    """Or the comparisons above would pass for weights that are not quantised at all."""
    losses = [train_oracle("some", base_format)[0][0] for base_format in FORMATS]
    losses.append(run_distributed(train, 1, build("some", "native"))[0][0][0])
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 2e-5


def list_collectives(case: Case) -> list[Collective]:
    gpt, _, topology = build_case(case)
    with count_collectives(topology) as counter:
        forward_backward(gpt, build_batches(topology), seed=0, step=0, scale_loss=None)
    return counter.read()


@pytest.mark.parametrize("adapters", few_of(ADAPTERS, "all", "latent", "sinks"))
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_same_is_communicated_as_over_native_weights(adapters: str, sequence_parallel: bool) -> None:
    options = {"tp_size": 2, "sequence_parallel": sequence_parallel}
    native, quantized = (
        run_distributed(list_collectives, 2, build(adapters, base_format, **options))[0]
        for base_format in ("native", "nf4")
    )
    assert native
    assert quantized == native
