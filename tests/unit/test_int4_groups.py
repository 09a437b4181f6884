"""Weights in int4: what does not fit is refused, with tensor and file named."""

from pathlib import Path

import pytest
import torch
from family_toy import edit_family_config, read_family_config, write_family_checkpoint
from fp8_files import LAYOUTS, write_fp8_checkpoint, write_two_files
from safetensors.torch import load_file

from lora_dist.files.hf_checkpoint import check_hf_checkpoint

WEIGHT = "model.layers.0.mlp.down_proj.weight"
WORDS, SCALES = f"{WEIGHT}_packed", f"{WEIGHT}_scale"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in groups of 16."""
    place = tmp_path_factory.mktemp("int4")
    write_family_checkpoint("llama", place / "source")
    write_fp8_checkpoint(place / "source", place / "int4", place / "plain", layout=LAYOUTS["int4"])
    return place / "int4"


@pytest.fixture
def changed(published: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy to spoil: its directory without weights, and they."""
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    return tmp_path, {key: one for file in published.glob("*.safetensors") for key, one in load_file(file).items()}


def test_the_published_one_is_whole(published: Path) -> None:
    check_hf_checkpoint(read_family_config(published), published)


def test_the_shape_is_no_more_than_the_other_two_say(changed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, tensors = changed
    write_two_files(directory, {name: one for name, one in tensors.items() if not name.endswith("_shape")})
    check_hf_checkpoint(read_family_config(directory), directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALES: None}, rf"{WEIGHT} is in int4 without {SCALES}; copy the checkpoint again"),
        ({WEIGHT: torch.ones(32, 48)}, rf"{WEIGHT} is in int4 and a second time in .*safetensors; copy the checkp"),
        (
            {WORDS: torch.ones(32, 6)},
            rf"{WORDS} is F32 and {SCALES} is F32, not I32 and one of F32, BF16,",
        ),
        ({SCALES: torch.ones(32, 3).int()}, rf"{WORDS} is I32 and {SCALES} is I32, not I32 and one of"),
        (
            {SCALES: torch.ones(32, 2)},
            r"has shape \(32, 6\) and .* has \(32, 2\); int4's are \[out, in / 8\] and \[out, in / 16\]",
        ),
        ({SCALES: torch.ones(96)}, r"has shape \(32, 6\) and .* has \(96,\); int4's are"),
        (
            {WORDS: torch.ones(32, 4).int(), SCALES: torch.ones(32, 2)},
            r"has shape \(32, 32\), config.json says",
        ),
        (
            {f"{WEIGHT}_zero_point": torch.ones(4, 3).int()},
            rf"holds {WEIGHT}_zero_point: asymmetric int4, .* convert the weights to bf16",
        ),
        ({f"{WEIGHT}_g_idx": torch.ones(48).int()}, rf"holds {WEIGHT}_g_idx: int4 whose groups are .* to bf16"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, torch.Tensor | None], message: str, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    write_two_files(directory, {name: one for name, one in (tensors | changes).items() if one is not None})
    with pytest.raises(ValueError, match=message) as refusal:
        check_hf_checkpoint(read_family_config(directory), directory)
    assert str(refusal.value).startswith(str(directory))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("settings", ["gone", LAYOUTS["compressed_row"].settings], ids=["none", "fp8"])
def test_int4_of_which_config_json_says_nothing_is_refused(
    settings: object, changed: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    directory, tensors = changed
    write_two_files(directory, tensors)
    edit_family_config(directory, quantization_config=settings)
    with pytest.raises(ValueError, match=r"is in int4, of which the quantization_config in config.json says nothing"):
        check_hf_checkpoint(read_family_config(directory), directory)
