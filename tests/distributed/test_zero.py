"""Training under ZeRO on every topology against plain torch AdamW in one process: losses, norms and final weights."""

from dataclasses import replace

import pytest
import torch
from processes import run_distributed
from tiers import exhaustive, few_of
from toy import MODEL, Case, build_batches, build_case, gather_whole, reduce_gradients

from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.engine import Engine
from lora_dist.mcore.schedule import forward_backward
from lora_dist.zero.engine import build_zero_engine

NUM_STEPS = 3
# The gradient of a key's bias is zero but for rounding, which Adam would blow up to whole steps under a small eps.
OPTIM = OptimConfig(lr=3e-3, clip_grad_norm=0.5, weight_decay=0.1, lora_plus_ratio=4.0, eps=1e-4)
TOY = replace(MODEL, num_layers=2)
LORA = Case(dtype=torch.float32, model=TOY, lora=LoraConfig(rank=3, target_modules=["all"], dropout=0.2, bias="all"))
FULL = Case(dtype=torch.float32, model=TOY, method="full")
EXPERTS = replace(
    TOY, family="glm4_moe", ffn_hidden_size=40, num_experts=5, experts_per_token=2, init_std=0.1, shared_ffn_size=24,
    num_dense_layers=1, dense_ffn_size=48,
)  # fmt: skip
EXPERT_TARGETS = ["v_proj", "gate_proj", "up_proj", "down_proj", "shared_gate_proj", "shared_down_proj"]
EXPERT_LORA = replace(LORA, model=EXPERTS, lora=LoraConfig(rank=3, target_modules=EXPERT_TARGETS))
EXPERT_FULL = replace(FULL, model=EXPERTS)
LATENT = replace(
    EXPERTS, family="deepseek_v3", head_size=10, query_latent_size=20, kv_latent_size=12, rope_head_size=4,
    value_head_size=6,
)  # fmt: skip
BIASED = replace(
    TOY, family="gpt_oss", num_kv_heads=2, ffn_hidden_size=40, num_experts=5, experts_per_token=2, init_std=0.15,
    sliding_window=5, full_attention_layers=[1], swiglu_alpha=1.702, swiglu_limit=0.5,
)  # fmt: skip
DELTA = replace(
    EXPERTS, family="qwen3_next", num_kv_heads=2, rotary_fraction=0.5, num_dense_layers=0, dense_ffn_size=None,
    full_attention_layers=[1], delta_key_heads=2, delta_value_heads=4, delta_key_size=8, delta_value_size=12,
    delta_kernel_size=4, layernorm_epsilon=1e-2,
)  # fmt: skip
DELTA_LORA = replace(LORA, model=DELTA, lora=LoraConfig(rank=3, alpha=12, target_modules=["all"], dropout=0.2))
DELTA_FULL = replace(FULL, model=DELTA)
BIASED_LORA = replace(LORA, model=BIASED, lora=LoraConfig(rank=3, alpha=5, target_modules=EXPERT_TARGETS[:4]))
BIASED_FULL = replace(FULL, model=BIASED)
WHOLE = replace(
    TOY, family="minimax_m2", num_kv_heads=2, rotary_fraction=0.5, ffn_hidden_size=40, num_experts=5,
    experts_per_token=2, init_std=0.1,
)  # fmt: skip
WHOLE_TARGETS = ["q_proj", "k_proj", "gate_proj"]
WHOLE_LORA = replace(
    LORA, model=WHOLE, lora=LoraConfig(rank=3, target_modules=WHOLE_TARGETS, modules_to_save=["k_norm"])
)
WHOLE_FULL = replace(FULL, model=WHOLE)
LATENT_LORA = replace(LORA, model=LATENT, lora=LoraConfig(rank=3, alpha=3, target_modules=["all"], dropout=0.2))
LATENT_FULL = replace(FULL, model=LATENT)
SPARSE = replace(
    LATENT, family="glm_moe_dsa", num_layers=3, rope_interleaved=True, attended_positions=4, indexer_heads=4,
    indexer_head_size=6, layers_without_indexer=[1], stages_begin_at_indexers=True,
)  # fmt: skip
SPARSE_LORA = replace(LATENT_LORA, model=SPARSE)
SPARSE_FULL = replace(LATENT_FULL, model=SPARSE)
SCALED = replace(
    TOY, family="granite", num_kv_heads=2, embedding_multiplier=3.0, residual_multiplier=0.5, attention_scale=0.3,
    logits_divisor=0.5,
)  # fmt: skip
SCALED_LORA = replace(LORA, model=SCALED, lora=LoraConfig(rank=3, target_modules=["all"], dropout=0.2))
SCALED_FULL = replace(FULL, model=SCALED)

Trained = tuple[list[float], list[float], dict[str, torch.Tensor]]


def train_oracle(case: Case) -> Trained:
    """Plain torch: AdamW over the same groups, torch's own clipping, one process."""
    gpt, trainable, topology = build_case(case)
    groups = [
        {
            "params": [one.parameter],
            "weight_decay": OPTIM.weight_decay if one.parameter.ndim > 1 and not one.name.endswith("bias") else 0.0,
            "lr": OPTIM.lr * (OPTIM.lora_plus_ratio if one.kind == "lora_B" else 1.0),
        }
        for one in trainable
    ]
    adam = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batches = build_batches(topology, seed=step)
        loss, _ = forward_backward(gpt, batches, seed=0, step=step, scale_loss=None)
        losses.append(loss)
        parameters = [one.parameter for one in trainable]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_grad_norm).item())
        adam.step()
        adam.zero_grad()
    return losses, norms, {one.name: gather_whole(one.parameter.detach(), one, topology) for one in trainable}


def train(case: Case, zero: ZeroConfig) -> Trained:
    gpt, trainable, topology = build_case(case)
    zero_engine = build_zero_engine(
        gpt, trainable, zero=zero, optim=OPTIM, micro_batch_size=1, dtype=case.dtype, topology=topology
    )
    engine = Engine(gpt, zero_engine, trainable, topology, seed=0)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        result = engine.train_step(build_batches(topology, seed=step), step=step, lr=OPTIM.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    engine.check_replicas()
    assert zero_engine.num_steps == NUM_STEPS
    values = {one.name: gather_whole(zero_engine.read_state(one)["value"], one, topology) for one in trainable}
    return losses, norms, values


def assert_trained_alike(results: list[Trained], expected: Trained) -> None:
    assert expected[1][0] > OPTIM.clip_grad_norm, "clipping must have something to do"
    seen = set()
    for losses, norms, values in results:
        assert losses == pytest.approx(expected[0], abs=1e-5)
        assert norms == pytest.approx(expected[1], rel=1e-4)
        for name, value in values.items():
            source = "embedding.word_embeddings.weight" if name == "output_layer.weight" else name
            torch.testing.assert_close(value, expected[2][source], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(source)
    assert seen == expected[2].keys()


@pytest.fixture(scope="module")
def oracles() -> dict[str, Trained]:
    return {case.method: run_distributed(train_oracle, 1, case)[0] for case in (LORA, FULL)}


GRID = [
    ({"dp_size": 2}, 0),
    ({"dp_size": 2}, 1),
    ({"dp_size": 2}, 2),
    ({"dp_size": 2}, 3),
    ({"tp_size": 2, "dp_size": 2}, 0),
    ({"tp_size": 2, "dp_size": 2}, 1),
    ({"tp_size": 2, "dp_size": 2, "sequence_parallel": True}, 2),
    ({"tp_size": 2, "dp_size": 2}, 3),
    ({"tp_size": 2, "pp_size": 2, "sequence_parallel": True}, 0),
    ({"tp_size": 2, "pp_size": 2}, 1),
    ({"pp_size": 2, "dp_size": 2, "recompute": "full"}, 2),
    ({"dp_size": 2, "recompute": "full"}, 3),
    ({"cp_size": 2}, 0),
    ({"cp_size": 2, "dp_size": 2}, 1),
    ({"tp_size": 2, "cp_size": 2, "sequence_parallel": True}, 2),
    ({"cp_size": 2, "dp_size": 2}, 3),
]
FEW = (GRID[1], GRID[3], *GRID[6:11:2], GRID[13])
"""Every stage, and every way to split."""


@pytest.mark.parametrize(("options", "stage"), few_of(GRID, *FEW), ids=lambda value: str(value).replace("'", ""))
@pytest.mark.parametrize("case", [LORA, FULL], ids=lambda case: case.method)
def test_trains_like_plain_torch(case: Case, options: dict, stage: int, oracles: dict[str, Trained]) -> None:
    distributed = replace(case, **options)
    results = run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage))
    assert_trained_alike(results, oracles[case.method])


@pytest.mark.parametrize(
    "case", [*exhaustive(DELTA_LORA), DELTA_FULL], ids=lambda case: f"{case.model.family}-{case.method}"
)
def test_delta_nets_train_like_plain_torch(case: Case) -> None:
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in GRID[3:11:4]:
        distributed = replace(case, **options)
        assert_trained_alike(
            run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage)), oracle
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [LATENT_LORA, LATENT_FULL], ids=lambda case: case.method)
def test_latents_train_like_plain_torch(case: Case) -> None:
    """What every TP rank has whole counts once in the norm, and its dropout is that of its part of the sequence."""
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in GRID[5:9]:
        distributed = replace(case, **options)
        assert_trained_alike(
            run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage)), oracle
        )


@pytest.mark.parametrize(
    ("case", "grid"),
    [(SPARSE_LORA, GRID[3:10:6]), *exhaustive((SPARSE_LORA, GRID[0:11:2]), (SPARSE_FULL, GRID[0:10:3]))],
    ids=["lora", "lora everywhere", "full"],
)
def test_long_rows_train_like_plain_torch(case: Case, grid: list[tuple[dict, int]]) -> None:
    """Longer than what an indexer picks: it stays whole and as it is at every stage."""
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in grid:
        distributed = replace(case, **options)
        assert_trained_alike(
            run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage)), oracle
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [SCALED_LORA, SCALED_FULL], ids=lambda case: case.method)
def test_multipliers_train_like_plain_torch(case: Case) -> None:
    """The embedding is the output layer too, which has none."""
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in GRID[5:12:3]:
        distributed = replace(case, **options)
        assert_trained_alike(
            run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage)), oracle
        )


@pytest.mark.parametrize(
    "case",
    [*exhaustive(EXPERT_LORA, EXPERT_FULL, BIASED_LORA, WHOLE_LORA, WHOLE_FULL), BIASED_FULL],
    ids=lambda case: f"{case.model.family}-{case.method}",
)
def test_experts_train_like_plain_torch(case: Case) -> None:
    """Each replica's tokens go to experts of their own: some have rows on one replica alone."""
    oracle = run_distributed(train_oracle, 1, case)[0]
    for options, stage in GRID[3:12:4]:
        distributed = replace(case, **options)
        assert_trained_alike(
            run_distributed(train, distributed.world_size, distributed, ZeroConfig(stage=stage)), oracle
        )


LARGE = {"hidden_size": 256}
LARGE_MODELS = {
    "experts": replace(EXPERTS, **LARGE, ffn_hidden_size=208, num_experts=3, shared_ffn_size=208, dense_ffn_size=208),
    "latents": replace(
        LATENT, **LARGE, head_size=64, query_latent_size=400, kv_latent_size=400, rope_head_size=16, value_head_size=48
    ),
}


LARGE_MODELS["delta nets"] = replace(DELTA, **LARGE, delta_value_size=112, delta_kernel_size=256, shared_ffn_size=208)
"""With kernels of so many positions, all but zeros, that they too are large."""


@pytest.mark.parametrize("name", few_of(LARGE_MODELS, "experts", "latents"))
@pytest.mark.parametrize("case", [EXPERT_LORA, EXPERT_FULL], ids=lambda case: case.method)
def test_what_zero_3_partitions_trains_like_plain_torch(case: Case, name: str) -> None:
    """DeepSpeed keeps what has fewer than 100,000 elements whole on every process, as all that a toy has."""
    targets = case.lora.target_modules if name == "experts" else ["all"]
    lora = replace(case.lora, rank=160, target_modules=targets)
    case = replace(case, model=LARGE_MODELS[name], dp_size=2, lora=lora)
    oracle = run_distributed(train_oracle, 1, replace(case, dp_size=1))[0]
    assert_trained_alike(run_distributed(train, 2, case, ZeroConfig(stage=3)), oracle)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_offload(stage: int, oracles: dict[str, Trained]) -> None:
    case = replace(LORA, dp_size=2)
    results = run_distributed(train, 2, case, ZeroConfig(stage=stage, offload_optimizer=True))
    assert_trained_alike(results, oracles["lora"])


def train_without_tp_sum(case: Case) -> Trained:
    import lora_dist.engine

    lora_dist.engine.sum_tp_partial_gradients = lambda trainable, topology: None
    return train(case, ZeroConfig(stage=1))


def test_a_forgotten_sum_is_seen(oracles: dict[str, Trained]) -> None:
    with pytest.raises(AssertionError):
        assert_trained_alike(run_distributed(train_without_tp_sum, 2, replace(LORA, tp_size=2)), oracles["lora"])


def compute_norm_of_unreduced(case: Case) -> float:
    """The norm that a topology would see with replicated factors counted on every TP rank."""
    gpt, trainable, topology = build_case(case)
    forward_backward(gpt, build_batches(topology, seed=0), seed=0, step=0, scale_loss=None)
    whole = reduce_gradients(trainable, topology)
    return torch.cat([gradient.flatten() for gradient in whole.values()]).norm().item()


def test_first_norm_is_that_of_the_whole_gradient(oracles: dict[str, Trained]) -> None:
    assert run_distributed(compute_norm_of_unreduced, 2, replace(LORA, tp_size=2))[0] == pytest.approx(
        oracles["lora"][1][0], rel=1e-4
    )
