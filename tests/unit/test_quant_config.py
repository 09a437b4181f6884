"""What a quantised base cannot be combined with is refused before anything is loaded, with the remedy."""

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.plan.job import list_variants
from lora_dist.plan.search import search_topologies
from lora_dist.run import configure_method


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.base_format=int8"], r"model.base_format='int8' is not one of native, nf4, nf4_double, fp8"),
        (["model.base_format=nf4", "method=full"], r"model.base_format=nf4 is frozen; method=full needs native"),
        (
            ["model.base_format=mxfp4", "model.family=llama"],
            r"mxfp4 is for the weights of experts, and llama has none; use nf4 or fp8",
        ),
        (["model=gpt_oss_20b", "model.base_format=mxfp4", "method=full"], r"mxfp4 is frozen; method=full needs native"),
        (
            ["model=gpt_oss_20b", "model.base_format=mxfp4", "topology=tp8"],
            r"mxfp4 keeps one scale for 32 weights of a row, and the 2880 inputs of down_proj .model.ffn_hidden_size."
            r" over tp 8 are no multiple of 32; lower",
        ),
        (["model.base_format=fp8", "zero=stage3"], r"is not partitioned by zero.stage=3; use zero.stage<=2"),
        (
            ["model.base_format=nf4", "topology=tp8"],
            r"nf4 keeps one scale for 64 weights of a row, and the 256 inputs of o_proj over tp 8 are no multiple of"
            r" 64; lower",
        ),
    ],
)
def test_refusals_name_the_value_and_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(overrides)


def test_a_comparison_with_full_fine_tuning_is_refused_before_it_begins() -> None:
    config = compose_config(["model.base_format=nf4"])
    remedy = r"compare.methods=\[lora\]"
    with pytest.raises(ValueError, match=remedy):
        list_variants(config)
    with pytest.raises(ValueError, match=remedy):
        configure_method(config, "full")


def test_a_search_leaves_out_topologies_that_cut_blocks() -> None:
    """With no memory at all the others are refused by their weights, so that none is executed."""
    overrides = ["model.base_format=nf4", "plan.search=true", "plan.num_gpus=8", "hardware.memory_gib=1e-3"]
    reasons = {one.name: one.reason for one in search_topologies(compose_config(overrides))}
    assert "256 inputs of o_proj over tp 8 are no multiple of 64" in reasons["tp8 pp1 dp1"]
    assert reasons["tp4 pp1 dp2"].endswith("GiB of weights > 0.0 GiB")
