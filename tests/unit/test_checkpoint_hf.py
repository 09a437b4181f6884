"""What is refused of a Hugging Face checkpoint before anything starts, the name map, and the safetensors stream."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hf_toy import edit_config, write_toy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from lora_dist.base_shapes import compute_canonical_shapes
from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import (
    check_hf_checkpoint,
    compute_base_fingerprint,
    read_model_fields,
)
from lora_dist.files.hf_gpt2 import GPT2_FAMILY
from lora_dist.files.safetensors_stream import open_writer, read_header, read_part


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("toy")
    return directory, write_toy_checkpoint(directory)


@pytest.fixture
def copied(toy: tuple[Path, ModelConfig], tmp_path: Path) -> tuple[Path, ModelConfig]:
    shutil.copytree(toy[0], tmp_path / "toy")
    return tmp_path / "toy", toy[1]


def refuse(directory: Path, model: ModelConfig) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check_hf_checkpoint(model, directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_names_cover_the_model(toy: tuple[Path, ModelConfig]) -> None:
    shapes = GPT2_FAMILY.compute_shapes(toy[1])
    assert {name: info.shape for name, info in read_header(toy[0] / "model.safetensors").items()} == {
        f"transformer.{name}": shape for name, shape in shapes.items()
    }
    canonical = compute_canonical_shapes(toy[1])
    assert {part.name for name in canonical for part in GPT2_FAMILY.find_parts(name, toy[1])} == shapes.keys()


@pytest.mark.parametrize("start", [0, 1, 3])
def test_parts_are_those_of_the_tensor_wherever_it_lies(start: int, tmp_path: Path) -> None:
    """Other programs need not align what they write."""
    value = torch.arange(60.0).view(3, 4, 5)
    entries = {
        "first": {"dtype": "U8", "shape": [start], "data_offsets": [0, start]},
        "value": {"dtype": "F32", "shape": [3, 4, 5], "data_offsets": [start, start + 240]},
        "flags": {"dtype": "BOOL", "shape": [], "data_offsets": [start + 240, start + 241]},
    }
    raw = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(start) + value.numpy().tobytes() + b"\1")
    header = read_header(path)
    assert torch.equal(read_part(header["value"]), value)
    for dim in range(3):
        assert torch.equal(read_part(header["value"], dim=dim, start=1, size=2), value.narrow(dim, 1, 2))
        assert torch.equal(read_part(header["value"], dim=dim, start=1), value.narrow(dim, 1, value.shape[dim] - 1))
    assert torch.equal(read_part(header["first"]), torch.zeros(start, dtype=torch.uint8))
    assert torch.equal(read_part(header["flags"]), torch.tensor(True))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}, "damaged: its header gives value, F32 of shape"),
        ({"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}, "holds a tensor of F4, not one of F64, F32, F16, BF16"),
    ],
)
def test_what_cannot_be_read_is_named(entry: dict, message: str, tmp_path: Path) -> None:
    raw, path = json.dumps({"value": entry}).encode(), tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(entry["data_offsets"][1]))
    with pytest.raises(ValueError, match=message) as refusal:
        read_part(read_header(path)["value"])
    assert str(path) in str(refusal.value)


def test_a_good_checkpoint_passes(toy: tuple[Path, ModelConfig]) -> None:
    check_hf_checkpoint(toy[1], toy[0])
    fields = read_model_fields(toy[0])
    assert (fields["num_layers"], fields["ffn_hidden_size"], fields["vocab_size"]) == (4, 48, 101)


def test_old_names_buffers_and_a_tied_head_pass(copied: tuple[Path, ModelConfig]) -> None:
    directory, model = copied
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, directory / "model.safetensors")
    check_hf_checkpoint(model, directory)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, directory / "model.safetensors")
    assert "lm_head.weight differs from wte.weight" in refuse(directory, model)


def test_a_wrong_vocabulary_names_both_sizes(toy: tuple[Path, ModelConfig]) -> None:
    fields = read_model_fields(toy[0]) | {"vocab_size": 50257}
    message = refuse(toy[0], ModelConfig(**fields))
    assert "model.vocab_size=50257" in message
    assert "set model.vocab_size=101" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"model_type": "mamba"}, "model_type='mamba' is not supported, only 'gpt2' or 'llama' or"),
        ({"n_layer": "four"}, "n_layer='four'"),
        ({"layer_norm_epsilon": 1e-6}, "model.layernorm_epsilon=1e-05"),
    ],
)
def test_a_model_that_is_not_computed_here_is_refused(
    copied: tuple[Path, ModelConfig], changes: dict, named: str
) -> None:
    edit_config(copied[0], **changes)
    assert named in refuse(*copied)


def test_missing_things_are_named(copied: tuple[Path, ModelConfig]) -> None:
    directory, model = copied
    assert "is not a directory" in refuse(directory / "nowhere", model)
    (directory / "model.safetensors").rename(directory / "away")
    assert "holds neither model.safetensors nor" in refuse(directory, model)
    (directory / "config.json").unlink()
    assert "config.json: No such file" in refuse(directory, model)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path, max_shard_size="40KB")
    check_hf_checkpoint(model, tmp_path)
    shard = sorted(tmp_path.glob("model-00002-*.safetensors"))[0]
    shard.unlink()
    assert f"{shard} does not exist" in refuse(tmp_path, model)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 60000])
def test_a_truncated_file_is_named(copied: tuple[Path, ModelConfig], num_bytes: int) -> None:
    path = copied[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    message = refuse(*copied)
    assert str(path) in message
    assert "truncated" in message or "damaged" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transformer.h.2.mlp.c_fc.bias": None}, "no tensor h.2.mlp.c_fc.bias"),
        ({"transformer.h.4.ln_1.weight": torch.zeros(32)}, "h.4.ln_1.weight"),
        ({"transformer.h.0.mlp.c_fc.bias": torch.zeros(64)}, r"h.0.mlp.c_fc.bias has shape (64,)"),
        ({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, "ln_f.bias is I8"),
    ],
)
def test_wrong_tensors_are_named(copied: tuple[Path, ModelConfig], changes: dict, named: str) -> None:
    change_tensors(copied[0], **changes)
    assert named in refuse(*copied)


def test_the_fingerprint_follows_the_weights(copied: tuple[Path, ModelConfig]) -> None:
    directory, model = copied
    model = ModelConfig(**read_model_fields(directory))
    before = compute_base_fingerprint(model, seed=0)
    assert before == compute_base_fingerprint(model, seed=1)
    tensors = load_file(directory / "model.safetensors")
    change_tensors(directory, **{"transformer.ln_f.bias": tensors["transformer.ln_f.bias"].flip(0)})
    assert compute_base_fingerprint(model, seed=0) != before
    model.checkpoint = None
    assert compute_base_fingerprint(model, seed=0) != compute_base_fingerprint(model, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_stream_is_an_ordinary_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.randn(3, 5).t(), "a": torch.randn(7), "empty": torch.zeros(0, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with open_writer(tmp_path / "x.safetensors", shapes, dtype) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in tensors.items())


def test_the_toy_is_what_transformers_reads(toy: tuple[Path, ModelConfig]) -> None:
    assert GPT2LMHeadModel.from_pretrained(toy[0]).config.n_inner == toy[1].ffn_hidden_size
