"""config.json's quantization_config: what it allows weights to be stored as, and what is refused by name."""

from pathlib import Path

import pytest
from fp8_files import LAYOUTS, describe_blocks, describe_compressed

from lora_dist.files.quantization import Quantization, read_quantization

PATH = Path("model/config.json")
BLOCKS = describe_blocks((6, 9)).settings
COMPRESSED = LAYOUTS["compressed_row"].settings
ROWS = {"weights": {"strategy": "channel"}}
TENSORS = {"weights": {"strategy": "tensor"}}


def groups_of(size: object, **weights: object) -> dict:
    """A group in int4."""
    return {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, **weights}}


WIDE = {"weights": {"strategy": "block", "block_structure": [128, 128]}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, None),
        (BLOCKS, Quantization(fp8=((6, 9),))),
        ({"quant_method": "fp8"}, Quantization(fp8=((None, None),))),
        ({"quant_method": "fbgemm_fp8"}, Quantization(fp8=((1, None),))),
        (COMPRESSED, Quantization(fp8=((1, None),))),
        (
            describe_compressed(TENSORS, WIDE, ROWS, TENSORS),
            Quantization(fp8=((None, None), (128, 128), (1, None))),
        ),
        (LAYOUTS["int4_and_fp8"].settings, Quantization(fp8=((1, None),), int4=(16,))),
        (describe_compressed(groups_of(32), groups_of(128), format="pack-quantized"), Quantization(int4=(32, 128))),
        (
            describe_compressed(groups_of(32, actorder="static"), format="pack-quantized"),
            Quantization(int4=(32,)),
        ),
        (
            describe_compressed(ROWS, sparsity_config={"format": "dense", "targets": []}),
            Quantization(fp8=((1, None),)),
        ),
        (COMPRESSED | {"config_groups": {}, "format": "dense"}, Quantization()),
        (COMPRESSED | {"config_groups": {"group_0": {"targets": ["Attention"], "weights": None}}}, Quantization()),
    ],
)
def test_it_allows_what_it_names(settings: dict | None, expected: Quantization | None) -> None:
    assert read_quantization({"quantization_config": settings}, PATH) == expected


def quantise(**weights: object) -> dict:
    """compressed-tensors' with other weights."""
    return describe_compressed({"weights": {"strategy": "channel", **weights}})


def pack(group: dict) -> dict:
    return describe_compressed(group, format="pack-quantized")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            " with quant_method='gptq' is not supported, only 'fp8' or 'fbgemm_fp8' or 'compressed-tensors'",
        ),
        ({"bits": 4}, " with quant_method=None is not supported, only 'fp8' or "),
        (BLOCKS | {"fmt": "e5m2"}, " with fmt='e5m2' is not supported, only 'e4m3'"),
        (
            BLOCKS | {"activation_scheme": "x"},
            " with activation_scheme='x' is not supported, only 'dynamic' or ",
        ),
        (BLOCKS | {"expert_dtype": "fp4"}, " with expert_dtype='fp4' is not supported, only 'fp8'"),
        (BLOCKS | {"scale_fmt": "other"}, " with scale_fmt='other' is not supported, only 'float' or 'ue8m0'"),
        (
            BLOCKS | {"weight_block_size": [128]},
            " with weight_block_size=[128] is not supported, only rows and columns",
        ),
        (BLOCKS | {"weight_block_size": [128, 0]}, " with weight_block_size=[128, 0] is not supported"),
        (
            describe_compressed(ROWS, format="nvfp4-pack-quantized"),
            "'s group_0 with format='nvfp4-pack-quantized' is not supported, only 'float-quantized' or 'nai",
        ),
        (
            describe_compressed(ROWS, {**ROWS, "format": "int-quantized"}),
            "'s group_1 with format='int-quantized' is n",
        ),
        (describe_compressed({**ROWS, "format": "mxfp8-quantized"}), "'s group_0 with format='mxfp8-quantized' is not"),
        (
            describe_compressed(ROWS, format="mixed-precision"),
            "'s group_0 with format='mixed-precision' is",
        ),
        (quantise(num_bits=4), "'s group_0.weights with num_bits=4 is not supported, only 8"),
        (quantise(type="int"), "'s group_0.weights with type='int' is not supported, only 'float'"),
        (quantise(symmetric=False), "'s group_0.weights with symmetric=False is not supported, only True"),
        (quantise(dynamic=True), "'s group_0.weights with dynamic=True is not supported, only False"),
        (
            quantise(strategy="group", group_size=32),
            "'s group_0.weights with strategy='group' is not supported, only 'tensor' or 'channel' or 'block'",
        ),
        (quantise(strategy=None), "'s group_0.weights with strategy=None is not supported"),
        (
            quantise(strategy="block"),
            "'s group_0.weights with block_structure=None is not supported, only rows",
        ),
        (pack(groups_of(20)), "'s group_0.weights with group_size=20 is not supported, only a multiple of 8"),
        (pack(groups_of(None)), "'s group_0.weights with group_size=None is not supported"),
        (pack(groups_of(32, num_bits=8)), "'s group_0.weights with num_bits=8 is not supported, only 4"),
        (pack(groups_of(32, type="float")), "'s group_0.weights with type='float' is not supported, only 'int'"),
        (pack(groups_of(32, symmetric=False)), "'s group_0.weights with symmetric=False is not supported, only True"),
        (pack(groups_of(32, strategy="channel")), "'s group_0.weights with strategy='channel' is not supported"),
        (pack(groups_of(32, actorder="group")), "'s group_0.weights with actorder='group' is not supported, only None"),
        (
            describe_compressed(WIDE, {"weights": {"strategy": "block", "block_structure": [64, 128]}}),
            " with blocks of [64, 128] and [128, 128] is not supported, only of one size",
        ),
        (
            describe_compressed(ROWS, sparsity_config={"format": "sparse-24-bitmask"}),
            "'s sparsity_config with format='sparse-24-bitmask' is not supported, only 'dense'",
        ),
        (
            describe_compressed(ROWS, transform_config={"config_groups": {"R1": {}}}),
            " with transform_config={'config_groups': {'R1': {}}} is not supported, only None or {}",
        ),
        (
            describe_compressed(ROWS, moe_sparsity_config={"method": "prune"}),
            " with moe_sparsity_config={'method': ",
        ),
        (COMPRESSED | {"config_groups": None}, ": config_groups=None is no JSON object"),
        (COMPRESSED | {"config_groups": {"FP8": ["Linear"]}}, ": FP8=['Linear'] is no JSON object"),
    ],
)
def test_other_ways_to_quantise_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*; convert the weights to bf16 first$") as refusal:
        read_quantization({"quantization_config": settings}, PATH)
    assert str(refusal.value).startswith(f"{PATH}: quantization_config{message}")


def test_what_says_it_elsewhere_is_named(tmp_path: Path) -> None:
    path, settings = tmp_path / "config.json", {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r"config.json has compression_config in the place of a quantization_config"):
        read_quantization({"compression_config": COMPRESSED}, path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf_quant_config.json lies in the place of .*; convert the weights to bf16"):
        read_quantization({}, path)
    assert read_quantization({"quantization_config": settings | {"fmt": None}}, path) is not None
