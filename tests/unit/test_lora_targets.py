"""Targets: names, aliases, expressions, layers and patterns resolve to specs, or say why not."""

import dataclasses

import pytest

from lora_dist.config import LoraConfig, ModelConfig
from lora_dist.lora.targets import build_adapter_specs, parse_layers

MODEL = ModelConfig(
    name="toy", num_layers=3, hidden_size=8, num_heads=2, ffn_hidden_size=16, vocab_size=11, max_position_embeddings=4
)


def names(**options: object) -> list[str]:
    return [spec.name for spec in build_adapter_specs(LoraConfig(**options), MODEL)]


def test_canonical_targets_in_layer_order() -> None:
    assert names(target_modules=["v_proj", "q_proj"], layers=["0", "2"]) == [
        "layers.0.q_proj",
        "layers.0.v_proj",
        "layers.2.q_proj",
        "layers.2.v_proj",
    ]


@pytest.mark.parametrize(
    ("alias", "targets"),
    [
        ("c_attn", ["q_proj", "k_proj", "v_proj"]),
        ("Wq", ["q_proj"]),
        ("query_key_value", ["q_proj", "k_proj", "v_proj"]),
        ("linear_proj", ["o_proj"]),
        ("c_fc", ["up_proj"]),
        ("c_proj", ["o_proj", "down_proj"]),
        ("fc2", ["down_proj"]),
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    ],
)
def test_alias(alias: str, targets: list[str]) -> None:
    assert names(target_modules=[alias], layers=["1"]) == [f"layers.1.{target}" for target in targets]


def test_regular_expression() -> None:
    assert names(target_modules=[r"layers\.[12]\.(o|down)_proj"]) == [
        "layers.1.o_proj",
        "layers.1.down_proj",
        "layers.2.o_proj",
        "layers.2.down_proj",
    ]


def test_unmatched_target_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'gate_proj' matches nothing; there are .*q_proj.* in layers 0 to 2"):
        names(target_modules=["q_proj", "gate_proj"])


EXPERTS = dataclasses.replace(MODEL, family="mixtral", num_experts=4, experts_per_token=2)


def test_all_means_what_every_token_passes() -> None:
    for pattern in ("all", "all-linear", "ALL-linear"):
        specs = build_adapter_specs(LoraConfig(target_modules=[pattern], layers=["1"]), EXPERTS)
        assert [spec.target for spec in specs] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_experts_that_are_named_have_adapters_each() -> None:
    lora = LoraConfig(rank=2, target_modules=["w1", "w2", "q_proj"], layers=["1"])
    specs = build_adapter_specs(lora, EXPERTS)
    assert [(spec.name, spec.num_experts) for spec in specs] == [
        ("layers.1.q_proj", None),
        ("layers.1.gate_proj", 4),
        ("layers.1.down_proj", 4),
    ]
    assert specs[1].num_parameters == 4 * 2 * (EXPERTS.hidden_size + EXPERTS.ffn_hidden_size)


@pytest.mark.parametrize("pattern", ["gate", "mlp.gate", "block_sparse_moe.gate", "router"])
def test_the_router_takes_none(pattern: str) -> None:
    message = f"'{pattern}' is the router of mixtral, which takes no adapter; the linears"
    with pytest.raises(ValueError, match=f"lora.target_modules: {message}"):
        build_adapter_specs(LoraConfig(target_modules=["q_proj", pattern]), EXPERTS)
    for key in ("rank_pattern", "alpha_pattern"):
        lora = LoraConfig(target_modules=["q_proj", "gate_proj"], **{key: {pattern: 2}})
        with pytest.raises(ValueError, match=f"lora.{key}: {message}"):
            build_adapter_specs(lora, EXPERTS)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_what_the_adapters_of_experts_have_not(options: dict) -> None:
    ((key, _),) = options.items()
    with pytest.raises(
        ValueError, match=f"lora.{key}=.*: layers.0.up_proj is a linear of experts, whose adapters want"
    ):
        build_adapter_specs(LoraConfig(target_modules=["q_proj", "up_proj"], **options), EXPERTS)
    build_adapter_specs(LoraConfig(target_modules=["q_proj"], **options), EXPERTS)


def test_broken_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"'q_\(' is neither a known name nor a regular expression"):
        names(target_modules=["q_("])


def test_layer_outside_the_model() -> None:
    with pytest.raises(ValueError, match=r"lora.layers: 3 does not exist; the model has layers 0 to 2"):
        names(layers=["0", "3"])


def test_layer_ranges() -> None:
    assert parse_layers("layers", ["0-2", "5"], 6) == {0, 1, 2, 5}
    assert parse_layers("layers", None, 2) == {0, 1}
    for wrong in ("2-1", "1-6", "x", "-1", "1-"):
        with pytest.raises(ValueError, match=f"lora.layers: .?{wrong}.? (does not exist|is neither)"):
            parse_layers("lora.layers", [wrong], 6)


def test_patterns_set_lora_rank_and_alpha() -> None:
    lora = LoraConfig(
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2, r"layers\.0\..*": 1},
        alpha_pattern={"q": 16.0},
    )
    specs = {spec.name: spec for spec in build_adapter_specs(lora, MODEL)}
    assert specs["layers.0.down_proj"].lora_rank == 1  # the later pattern wins
    assert specs["layers.1.down_proj"].lora_rank == 2
    assert specs["layers.1.q_proj"].scaling == 4.0
    assert specs["layers.1.down_proj"].scaling == 4.0
    assert (specs["layers.1.down_proj"].in_features, specs["layers.1.down_proj"].out_features) == (16, 8)


def test_pattern_that_matches_no_adapter() -> None:
    with pytest.raises(ValueError, match=r"lora.rank_pattern: 'o_proj' matches nothing; there are q_proj"):
        names(target_modules=["q_proj"], rank_pattern={"o_proj": 2})


def test_gpt3_175b_count_of_the_paper() -> None:
    """Rank 4 on q and v of GPT-3 175B: 18.9 M parameters, 37.75 MB in fp16 (the paper's 35 MB)."""
    gpt3 = dataclasses.replace(MODEL, num_layers=96, hidden_size=12288, num_heads=96, ffn_hidden_size=49152)
    assert sum(spec.num_parameters for spec in build_adapter_specs(LoraConfig(), gpt3)) == 18_874_368


def test_rank_stabilized_scaling_divides_by_the_root_of_the_rank() -> None:
    lora = LoraConfig(rank=16, alpha=8, use_rslora=True, rank_pattern={"v_proj": 4})
    specs = {spec.name: spec for spec in build_adapter_specs(lora, MODEL)}
    assert specs["layers.0.q_proj"].scaling == 8 / 4
    assert specs["layers.0.v_proj"].scaling == 8 / 2
