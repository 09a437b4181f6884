"""Gradients of every family at every topology against one process in fp64, B not zero, and against transformers."""

from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, UNLIKE
from family_toy import StayDouble, build_family_model, name_as_stored, read_family_config, write_family_checkpoint
from hf_toy import build_shard, draw_tokens
from processes import run_distributed
from tiers import few_of
from toy import Case, compute_gradients, merge_results, reduce_gradients

from lora_dist.batch import Batch
from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_layout import split_to_hf
from lora_dist.lora.spec import CANONICAL_TARGETS
from lora_dist.lora.targets import compute_linear_shapes
from lora_dist.mcore.base_parameters import describe_base_parameters
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.schedule import forward_backward

pytestmark = pytest.mark.usefixtures("small_tiles")

TOLERANCE = 1e-9
TOPOLOGIES = [
    {"tp_size": 2},
    {"tp_size": 4, "sequence_parallel": True},
    {"pp_size": 2},
    {"tp_size": 2, "pp_size": 2, "sequence_parallel": True, "recompute": "full"},
    {"tp_size": 2, "recompute": "selective"},
]


def build_toy(family: str, **options: object) -> ModelConfig:
    sizes = {"num_layers": 3, "hidden_size": 32, "num_heads": 8, "ffn_hidden_size": 40, "vocab_size": 101}
    return ModelConfig(name=family, family=family, max_position_embeddings=32, **sizes | options)  # type: ignore[arg-type]


PICKED = {
    "ffn_hidden_size": 12,
    "num_experts": 8,
    "experts_per_token": 3,
    "num_expert_groups": 4,
    "groups_per_token": 2,
    "expert_weight_scale": 1.7,
    "shared_ffn_size": 24,
    "num_dense_layers": 1,
    "dense_ffn_size": 40,
}
LATENT = {"kv_latent_size": 12, "head_size": 10, "rope_head_size": 4, "value_head_size": 6, "tied_output": False}
INDEXER = {"attended_positions": 32, "indexer_heads": 2, "indexer_head_size": 6, "layers_without_indexer": [1]}
DELTA_SIZES = {
    **{"delta_key_heads": 4, "delta_value_heads": 8, "delta_key_size": 6, "delta_value_size": 5},
    "delta_kernel_size": 4,
}
MODELS = {
    "llama": build_toy("llama", num_kv_heads=4, tied_output=False),
    "qwen2": build_toy("qwen2", num_kv_heads=8, tied_output=True),
    "qwen3": build_toy("qwen3", num_kv_heads=4, head_size=6, tied_output=False),
    "gemma3_text": build_toy(
        "gemma3_text",
        num_kv_heads=4,
        head_size=6,
        sliding_window=5,
        full_attention_layers=[1],
        local_rope_theta=100.0,
        attention_scale=0.4,
    ),
    "mixtral": build_toy("mixtral", num_kv_heads=4, num_experts=3, experts_per_token=2, tied_output=False),
    "qwen3_moe": build_toy(
        "qwen3_moe",
        num_kv_heads=4,
        ffn_hidden_size=12,
        num_experts=8,
        experts_per_token=3,
        normalize_expert_weights=False,
        tied_output=True,
    ),
    "qwen3_next": build_toy(
        "qwen3_next",
        num_kv_heads=2,  # which two of four TP ranks share
        head_size=8,
        rotary_fraction=0.5,
        full_attention_layers=[1],
        **DELTA_SIZES,
        ffn_hidden_size=12,
        num_experts=4,
        experts_per_token=2,
        shared_ffn_size=24,
        tied_output=False,
    ),
    "qwen3_5_text": build_toy(
        "qwen3_5_text", num_kv_heads=4, head_size=8, rotary_fraction=0.25, full_attention_layers=[1], **DELTA_SIZES
    ),
    "glm4_moe": build_toy("glm4_moe", num_kv_heads=4, rotary_fraction=0.5, qk_norm=True, **PICKED),
    "granite": build_toy(
        "granite",
        num_kv_heads=4,
        embedding_multiplier=3.0,
        attention_scale=0.3,
        residual_multiplier=0.7,
        logits_divisor=0.5,
    ),
    "seed_oss": build_toy("seed_oss", num_kv_heads=4, head_size=6, tied_output=False),
    "ministral3": build_toy(
        "ministral3",
        num_kv_heads=4,
        tied_output=False,
        query_growth=0.4,
        rope_scaling={
            **{"factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0},
            "original_max_position_embeddings": 4.0,
        },
    ),
    "smollm3": build_toy(
        "smollm3", num_kv_heads=4, unturned_layers=[1], sliding_window=5, full_attention_layers=[2], tied_output=False
    ),
    "olmo2": build_toy("olmo2", num_kv_heads=4, tied_output=False),
    "olmo3": build_toy(
        "olmo3", num_kv_heads=4, head_size=6, sliding_window=5, full_attention_layers=[1], local_rope_theta=100.0
    ),
    "minimax_m2": build_toy(
        "minimax_m2",
        num_kv_heads=4,
        head_size=6,
        rotary_fraction=1 / 3,
        ffn_hidden_size=12,
        num_experts=6,
        experts_per_token=3,
        tied_output=False,
    ),
    "deepseek_v3": build_toy("deepseek_v3", query_latent_size=20, rope_interleaved=True, **LATENT, **PICKED),
    "glm_moe_dsa": build_toy(
        "glm_moe_dsa",
        query_latent_size=20,
        rope_interleaved=True,
        **INDEXER,
        **LATENT | {"value_head_size": 10},
        **PICKED,
    ),
    "glm_moe_dsa_long": build_toy(
        "glm_moe_dsa",
        query_latent_size=20,
        rope_interleaved=True,
        **INDEXER | {"attended_positions": 5, "layers_without_indexer": [2]},
        **LATENT,
        **PICKED,
    ),
    "deepseek_v3_direct": build_toy("deepseek_v3", **LATENT, **PICKED),
    "gpt_oss": build_toy(
        "gpt_oss",
        num_kv_heads=4,
        head_size=8,
        ffn_hidden_size=12,
        num_experts=4,
        experts_per_token=2,
        sliding_window=5,
        full_attention_layers=[1],
        swiglu_alpha=1.702,
        swiglu_limit=0.1,  # which some gates exceed, and some do not
        tied_output=False,
    ),
    "phi3": build_toy("phi3", num_kv_heads=4, rotary_fraction=0.5, sliding_window=12),
    "opt": build_toy("opt"),
    "gpt_neox": build_toy("gpt_neox", tied_output=False, rotary_fraction=0.5),
}


def run_case(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    return merge_results(run_distributed(compute_gradients, case.world_size, case))


def build_case_of(name: str, method: str, **options: object) -> Case:
    there = {
        target for layer in range(MODELS[name].num_layers) for target in compute_linear_shapes(MODELS[name], layer)
    }
    targets = [target for target in CANONICAL_TARGETS if target in there]
    lora = LoraConfig(rank=3, target_modules=targets)
    return Case(model=MODELS[name], method=method, lora=lora, **options)  # type: ignore[arg-type]


_CASES = [
    *(("llama", method, TOPOLOGIES) for method in ("lora", "full")),
    *(("qwen3", method, TOPOLOGIES[1:4:2]) for method in ("lora", "full")),
    ("qwen2", "full", TOPOLOGIES[1:4:2]),
    *(("gemma3_text", method, TOPOLOGIES[1:]) for method in ("lora", "full")),
    *((name, method, TOPOLOGIES[1:4:2]) for name in ("mixtral", "qwen3_moe") for method in ("lora", "full")),
    *(
        (name, method, TOPOLOGIES)
        for name in ("qwen3_next", "glm4_moe", "minimax_m2", "deepseek_v3", "glm_moe_dsa_long", "gpt_oss")
        for method in ("lora", "full")
    ),
    *(
        (name, method, TOPOLOGIES[1:4:2])
        for name in ("qwen3_5_text", "glm_moe_dsa", "deepseek_v3_direct")
        for method in ("lora", "full")
    ),
    *((name, "full", TOPOLOGIES[1:4:2]) for name in ("seed_oss", "ministral3")),
    *(
        (name, method, TOPOLOGIES[1:4])
        for name in ("granite", "smollm3", "olmo2", "olmo3")
        for method in ("lora", "full")
    ),
    ("phi3", "lora", TOPOLOGIES[1:4:2]),
    ("opt", "lora", TOPOLOGIES[1:4:2]),
    *(("gpt_neox", method, TOPOLOGIES[1:]) for method in ("lora", "full")),
]
CASES = {f"{name}-{method}": (name, method, topologies) for name, method, topologies in _CASES}
ALWAYS = (
    "llama-lora",
    "gemma3_text-lora",
    "qwen3_next-lora",
    "minimax_m2-lora",
    "granite-full",
    "olmo3-full",
    "deepseek_v3-lora",
    "glm_moe_dsa_long-lora",
    "gpt_oss-full",
    "gpt_neox-full",
)


@pytest.mark.parametrize("case", few_of(CASES, *ALWAYS))
def test_gradients_equal_one_process(case: str) -> None:
    name, method, topologies = CASES[case]
    expected_loss, expected = run_case(build_case_of(name, method))
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for options in topologies:
        loss, actual = run_case(build_case_of(name, method, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        if MODELS[name].tied_output:
            actual.pop("output_layer.weight", None)
        assert actual.keys() == expected.keys()
        for key, gradient in expected.items():
            error = (actual[key] - gradient).abs().max() / gradient.abs().max()
            assert error < TOLERANCE, (options, key)


BOUNDARY = 7
"""Where the second example of a packed row begins."""


def build_packed_batch(tokens_BS: torch.Tensor) -> Batch:
    """Two examples a row, each with positions of its own; every token but each example's first is a target."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).clone()
    positions_BS[:, BOUNDARY:] -= BOUNDARY
    loss_mask_BS = positions_BS != 0
    loss_mask_BS = loss_mask_BS.roll(-1, dims=1)
    return Batch(
        input_ids_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        loss_mask_BS=loss_mask_BS,
        position_ids_BS=positions_BS,
        row_blocks=((BOUNDARY, tokens_BS.shape[1] - BOUNDARY),) * len(tokens_BS),
        row_ids_B=torch.arange(len(tokens_BS)),
        num_loss_tokens=int(loss_mask_BS.sum()),
        num_tokens=tokens_BS.numel(),
    )


def compute_packed_gradients(options: dict, source: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of packed rows and every gradient by transformers' name."""
    model = read_family_config(source)
    gpt = build_shard(options, model, torch.float64)
    load_hf_checkpoint(gpt, source)
    batch = build_packed_batch(draw_tokens())
    loss, _ = forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
    stored, family = {}, HF_FAMILIES[model.family]
    for name, gradient in reduce_gradients(describe_base_parameters(gpt), gpt.topology).items():
        of_experts = {name.replace(".mlp.", f".mlp.experts.{expert}."): one for expert, one in enumerate(gradient)}
        is_stacked = gradient.ndim == (2 if name.endswith(".bias") else 3)
        for each, one in of_experts.items() if is_stacked else [(name, gradient)]:
            for key, part in split_to_hf(one, family.find_parts(each, model), model).items():
                stored[key] = torch.cat([stored[key], part]) if key in stored else part  # one expert after the other
    return loss, {f"{family.find_module(name)}.{name.rpartition('.')[2]}": one for name, one in stored.items()}


def compute_expected_gradients(name: str, source: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers, each example alone."""
    model = build_family_model(name).double()
    with StayDouble():
        losses = [
            torch.nn.functional.cross_entropy(model(example).logits[:, :-1].flatten(0, 1), example[:, 1:].flatten())
            * example[:, 1:].numel()
            for example in draw_tokens().split([BOUNDARY, draw_tokens().shape[1] - BOUNDARY], dim=1)
        ]
    loss = torch.stack(losses).sum() / int(build_packed_batch(draw_tokens()).num_loss_tokens)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return loss.item(), name_as_stored(gradients, read_family_config(source))


@pytest.mark.parametrize("name", few_of(FAMILIES, *UNLIKE, "mistral", "qwen2_windows", "glm4_moe", "glm_moe_dsa"))
def test_packed_examples_have_the_gradients_that_transformers_gives_each_alone(name: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    expected_loss, expected = compute_expected_gradients(name, tmp_path)
    loss, actual = run_distributed(compute_packed_gradients, 2, {"tp_size": 2}, tmp_path)[0]
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        # A bias of the keys shifts all scores of a query alike, so without rotation its gradient is rounding alone.
        assert (actual[key] - gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-15, key
