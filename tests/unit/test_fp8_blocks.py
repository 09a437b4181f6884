"""Weights in fp8: every slice of one is that slice of its values, and what is refused, with tensor and file named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_toy import edit_family_config, read_family_config, write_family_checkpoint
from fp8_files import write_fp8_checkpoint, write_two_files
from safetensors.torch import load_file

from lora_dist.cli.compose import compose_config
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import (
    check_hf_checkpoint,
    compute_base_fingerprint,
    read_dtype,
    read_model_fields,
)
from lora_dist.files.hf_reader import HfReader

NARROW = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
SCALES = f"{NARROW}_scale_inv"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A DeepSeek in blocks of [6, 9], and its values."""
    place = tmp_path_factory.mktemp("fp8")
    write_family_checkpoint("deepseek_v3", place / "source")
    values = write_fp8_checkpoint(place / "source", place / "fp8", place / "plain", block_size=(6, 9))
    return place / "fp8", values


@pytest.fixture
def changed(published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy to spoil: its directory without weights, and they."""
    (tmp_path / "config.json").write_text((published[0] / "config.json").read_text())
    return tmp_path, {key: one for file in published[0].glob("*.safetensors") for key, one in load_file(file).items()}


def test_every_slice_has_its_own_blocks_scales(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, values = published
    reader, value = HfReader(directory), values[NARROW]
    assert value.shape == (16, 32)
    assert torch.equal(reader.read(NARROW), value)
    for dim, length in enumerate(value.shape):
        for start in range(length + 1):
            for size in range(length - start + 1):
                part = reader.read(NARROW, dim=dim, start=start, size=size)
                assert torch.equal(part, value.narrow(dim, start, size))
            assert torch.equal(reader.read(NARROW, dim=dim, start=start), value.narrow(dim, start, length - start))


def test_what_a_reader_shows_is_the_model(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, values = published
    reader = HfReader(directory)
    assert reader.shapes == {name: tuple(value.shape) for name, value in values.items()}
    assert reader.dtypes[NARROW] == "BF16"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "gone", "torch_dtype": "float16"}, torch.float16),
        ({"dtype": "gone"}, torch.bfloat16),
    ],
)
def test_its_dtype_is_the_one_before_fp8(
    stated: dict, expected: torch.dtype, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    native = {name: one.to(expected) for name, one in tensors.items() if one.itemsize > 1 and "_scale_inv" not in name}
    write_two_files(directory, tensors | native)
    edit_family_config(directory, **stated)
    assert read_dtype(directory) == expected


def test_a_layer_that_predicts_further_tokens_may_be_in_fp8_too(
    changed: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, tensors = changed
    further = "model.layers.4.self_attn.o_proj.weight"
    write_two_files(directory, {**tensors, further: tensors[NARROW], f"{further}_scale_inv": tensors[SCALES]})
    check_hf_checkpoint(read_family_config(directory), directory)


def test_the_fingerprint_follows_weights_and_scales(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    found = []
    for scales in (tensors[SCALES], 2 * tensors[SCALES], tensors[SCALES]):
        write_two_files(directory, tensors | {SCALES: scales})
        found.append(compute_base_fingerprint(ModelConfig(**read_model_fields(directory)), 0))
    assert found[0] == found[2] != found[1]


def test_it_is_composed_and_so_planned_as_its_values_are(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directories = [str(published[0].parent / name) for name in ("fp8", "plain")]
    more = ["data=fake", "data.seq_len=16", "lora.target_modules=[all]"]
    fp8, plain = (compose_config(["model=hf", f"model.checkpoint={one}", *more]) for one in directories)
    assert replace(fp8.model, checkpoint=None) == replace(plain.model, checkpoint=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALES: None}, rf"{NARROW} is in fp8 without scales {SCALES}; copy them again"),
        ({NARROW: None}, rf"{SCALES} has the scales of a weight in fp8, but {NARROW} is missing"),
        ({NARROW: torch.zeros(16, 32)}, rf"{SCALES} has the scales of a weight in fp8, but {NARROW} is F32"),
        ({SCALES: torch.ones(4, 3)}, r"has shape \(4, 3\), but .* of \(16, 32\) has \(3, 4\) blocks of .*=\[6, 9\]"),
        ({SCALES: torch.ones(())}, rf"{SCALES} has shape \(\), but"),
        ({SCALES: torch.ones(3, 4, dtype=torch.uint8)}, rf"{SCALES} is U8, not one of F32, BF16, F8_E8M0"),
        ({NARROW: torch.zeros(16).to(torch.float8_e4m3fn)}, r"is in fp8 with shape \(16,\); only matrices have blocks"),
    ],
)
def test_weights_and_scales_that_do_not_fit_are_named(
    changes: dict[str, torch.Tensor | None], message: str, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    model = read_family_config(directory)
    write_two_files(directory, {name: one for name, one in (tensors | changes).items() if one is not None})
    with pytest.raises(ValueError, match=rf"^{directory}/model-0000\d-of-00002.safetensors: [^\n]*$") as refusal:
        check_hf_checkpoint(model, directory)
    assert refusal.match(message)


def test_stacked_experts_in_fp8_are_named_too(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    more = {stacked: tensors[NARROW].expand(8, 16, 32), f"{stacked}_scale_inv": torch.ones(8, 3, 4)}
    write_two_files(directory, tensors | more)
    with pytest.raises(ValueError, match=rf"{stacked} holds all experts of a layer, as transformers has them"):
        check_hf_checkpoint(read_family_config(directory), directory)


def test_fp8_without_the_size_of_its_blocks_is_refused(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    write_two_files(directory, tensors)
    edit_family_config(directory, quantization_config="gone")
    with pytest.raises(ValueError, match=r"is in fp8, but config.json has no quantization_config with weight_block_"):
        check_hf_checkpoint(read_family_config(directory), directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "compressed-tensors"},
            "quant_method='compressed-tensors' is not supported, only 'fp8'; conv",
        ),
        ({"quant_method": None}, "quant_method=None is not supported, only 'fp8'; convert the weights to bf16 first"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported, only 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme='static' is not supported, only 'dynamic'"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported, only 'fp8'"),
        ({"scale_fmt": "other"}, "scale_fmt='other' is not supported, only 'float' or 'ue8m0'"),
        ({"weight_block_size": None}, "weight_block_size=None is not supported, only rows and columns of a block as"),
        ({"weight_block_size": [128]}, "weight_block_size=[128] is not supported"),
        ({"weight_block_size": [128, 0]}, "weight_block_size=[128, 0] is not supported"),
    ],
)
def test_other_ways_to_quantise_are_refused(
    changes: dict, message: str, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, _ = changed
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit_family_config(directory, quantization_config=config["quantization_config"] | changes)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        read_model_fields(directory)
    assert str(refusal.value).startswith(f"{path}: quantization_config with ")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "more",
    [
        {"scale_fmt": "ue8m0"},
        {"modules_to_not_convert": ["lm_head"]},
        {"ignored_layers": ["lm_head"]},
        {"modules_to_convert": None, "dequantize": False, "expert_dtype": "fp8", "scale_fmt": "float"},
    ],
    ids=str,
)
def test_what_published_ones_say_beside_it_is_no_obstacle(
    more: dict, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    write_two_files(directory, tensors)
    config = json.loads((directory / "config.json").read_text())
    edit_family_config(directory, quantization_config=config["quantization_config"] | more)
    check_hf_checkpoint(read_family_config(directory), directory)
