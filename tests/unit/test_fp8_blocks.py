"""Weights in fp8: every slice of one is that slice of its values, and what is refused, with tensor and file named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_toy import edit_family_config, read_family_config, write_family_checkpoint
from fp8_files import LAYOUTS, describe_compressed, write_fp8_checkpoint, write_two_files
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_slice_of_every_layout_has_its_own_scales(name: str, tmp_path: Path) -> None:
    weight, norm = "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.input_layernorm.weight"
    shape = (5, 32) if LAYOUTS[name].int4_group else (9, 11)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {weight: torch.randn(shape, generator=torch.Generator().manual_seed(0)), norm: torch.ones(11)}
    save_file(tensors, source / "model.safetensors")
    values = write_fp8_checkpoint(source, tmp_path / "fp8", tmp_path / "plain", layout=LAYOUTS[name])
    assert 0 < (values[weight] - tensors[weight]).abs().max() < 0.25
    reader = HfReader(tmp_path / "fp8")
    assert reader.shapes == {weight: shape, norm: (11,)}
    assert reader.dtypes == {weight: "BF16", norm: "F32"}
    assert torch.equal(reader.read(weight), values[weight])
    for dim, length in enumerate(shape):
        for start in range(length + 1):
            for size in range(length - start + 1):
                part = reader.read(weight, dim=dim, start=start, size=size)
                assert torch.equal(part, values[weight].narrow(dim, start, size))


def test_the_dtype_of_a_quantised_one_is_that_of_its_config(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Also where its norms are stored in fp32."""
    directory, tensors = changed
    write_two_files(directory, tensors)
    assert read_dtype(directory) == torch.bfloat16
    edit_family_config(directory, dtype="float16")
    assert read_dtype(directory) == torch.float16
    edit_family_config(directory, dtype="gone")
    assert read_dtype(directory) == torch.bfloat16


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
        ({SCALES: None}, rf"{NARROW} is in fp8 without scales {SCALES} or {NARROW}_scale; copy them again"),
        ({f"{NARROW}_scale": torch.ones(3, 4)}, rf"{NARROW}_scale has the scales of .* but {NARROW} has {SCALES} too"),
        (
            {"x.weight_scale": torch.ones(3, 4)},
            r"x.weight_scale has the scales of a weight in fp8, but x.weight is m",
        ),
        ({NARROW: None}, rf"{SCALES} has the scales of a weight in fp8, but {NARROW} is missing"),
        ({NARROW: torch.zeros(16, 32)}, rf"{SCALES} has the scales of a weight in fp8, but {NARROW} is F32"),
        ({SCALES: torch.ones(4, 3)}, r"has shape \(4, 3\), but .* of \(16, 32\) has scales of \(3, 4\) by config"),
        ({SCALES: torch.ones(())}, rf"{SCALES} has shape \(\), but"),
        ({SCALES: torch.ones(3, 4, dtype=torch.uint8)}, rf"{SCALES} is U8, not one of F32, BF16, F16, F8_E8M0"),
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


@pytest.mark.parametrize(
    "name", ["self_attn.k_scale", "self_attn.k_proj.input_scale", "self_attn.kv_b_proj.weight_zero_point"]
)
def test_only_a_checkpoint_in_fp8_has_scales_of_activations_and_cache(
    name: str, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    native = {key: one.float() for key, one in tensors.items() if "_scale_inv" not in key}
    write_two_files(directory, native | {f"model.layers.0.{name}": torch.ones(1)})
    edit_family_config(directory, quantization_config="gone")
    with pytest.raises(ValueError, match=rf"holds model.layers.0.{name} \(1 in all\), which its family has not"):
        check_hf_checkpoint(read_family_config(directory), directory)


def test_weights_may_differ_in_how_many_share_a_scale(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    groups = [{"weights": {"strategy": "block", "block_structure": [6, 9]}}, {"weights": {"strategy": "channel"}}]
    edit_family_config(directory, quantization_config=describe_compressed(*groups))
    renamed = {name.removesuffix("_inv"): one for name, one in tensors.items()}
    scales = torch.rand(16, 1, generator=torch.Generator().manual_seed(0))
    write_two_files(directory, renamed | {f"{NARROW}_scale": scales})
    check_hf_checkpoint(read_family_config(directory), directory)
    reader, other = HfReader(directory), NARROW.replace("kv_a_proj_with_mqa", "q_a_proj")
    assert torch.equal(reader.read(NARROW), tensors[NARROW].float() * scales)
    by_block = tensors[f"{other}_scale_inv"].repeat_interleave(6, 0).repeat_interleave(9, 1)
    assert torch.equal(reader.read(other), tensors[other].float() * by_block[:20, :32])


def test_stacked_experts_in_fp8_beside_single_ones_are_named(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    more = {stacked: tensors[NARROW].expand(8, 16, 32), f"{stacked}_scale_inv": torch.ones(8, 3, 4)}
    write_two_files(directory, tensors | more)
    with pytest.raises(ValueError, match=rf"{stacked}(_scale_inv)?, of all experts of a layer, and .* of one; write"):
        read_family_config(directory)


def test_fp8_of_which_config_json_says_nothing_is_refused(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    write_two_files(directory, tensors)
    edit_family_config(directory, quantization_config="gone")
    with pytest.raises(ValueError, match=r"in fp8, of which the quantization_config in config.json says nothing; copy"):
        check_hf_checkpoint(read_family_config(directory), directory)


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
