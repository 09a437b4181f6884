"""Foreign adapters that have no place here are refused by name, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import build_loralib_state, read_in, write_with_peft
from family_toy import build_family_model, write_family_checkpoint
from hf_toy import build_hf_model, write_toy_checkpoint
from safetensors.torch import load_file, save_file

from lora_dist.config import ModelConfig
from lora_dist.files.imported import drop_keys


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("base")
    return directory, write_toy_checkpoint(directory)


def damage_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "attn.c_attn.lora_magnitude_vector is missing"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' trained beside a changed base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] unties the output layer"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha=None is not a number"),
        ({"alpha_pattern": {"(c_attn": 2}}, "alpha_pattern: '(c_attn' is no regular expression"),
        ({"rank_pattern": {"c_attn": "2"}}, "rank_pattern.c_attn='2' is not a number"),
        ({"r": 5}, "c_attn.lora_A.weight has shape (2, 32), adapter_config.json says rank 5"),
        ({"bias": "all"}, "h.0.attn.c_attn.bias has shape none, bias=all on"),
    ],
)
def test_what_peft_means_otherwise_is_refused(
    changes: dict, message: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2)
    damage_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match="source") as caught:
        read_in(tmp_path / "source", tmp_path / "stored", base[1])
    assert message in str(caught.value)
    assert not (tmp_path / "stored").exists()


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight", None, "c_attn.lora_B.weight is missing"),
        ("base_model.model.score.weight", torch.ones(2), "score.weight is neither a LoRA factor nor a bias"),
        ("base_model.model.transformer.h.9.attn.c_attn", (2, 32, 96), "in layers 0 to 3"),
        ("base_model.model.transformer.h.0.attn.nothing", (2, 32, 96), "is no linear of a layer that is known here"),
        ("base_model.model.transformer.h.0.mlp.c_fc", (2, 32, 40), "needs ((2, 32), (48, 2))"),
    ],
)
def test_tensors_without_a_place_are_named(
    key: str, tensor: object, message: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2)
    path = tmp_path / "source/adapter_model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        tensors.pop(key)
    elif isinstance(tensor, tuple):
        r, h, o = tensor
        tensors |= {f"{key}.lora_A.weight": torch.ones(r, h), f"{key}.lora_B.weight": torch.ones(o, r)}
    else:
        tensors[key] = tensor  # type: ignore[assignment]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="adapter_model") as caught:
        read_in(tmp_path / "source", tmp_path / "stored", base[1])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.fill_(torch.nan), "lora_A holds values that are not finite"),
        (lambda tensor: tensor.to(torch.int64), "lora_A is torch.int64; only floating point is supported"),
    ],
)
def test_values_that_are_none_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_fc"], r=2)
    path = tmp_path / "source/adapter_model.safetensors"
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    tensors = load_file(path)
    save_file(tensors | {key: change(tensors[key])}, path)
    with pytest.raises(ValueError, match="source") as caught:
        read_in(tmp_path / "source", tmp_path / "stored", base[1])
    assert message in str(caught.value)
    assert not (tmp_path / "stored").exists()


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (
            {"alpha": 8.0},
            {},
            "alpha=8.0, but PLACE/lora_settings.json has lora_alpha=16 of transformer.h.0.",
        ),
        ({"fused_targets": ["q_proj"]}, {}, "fused_targets=['q_proj'], but PLACE/lora_settings.json has enable_lora="),
        ({}, {"r": 2}, "transformer.h.0.attn.c_attn has r=2, but its factors have rank 3"),
        ({}, {"lora_alpha": "16"}, "has no numbers r and lora_alpha of transformer.h.0.attn.c_attn; if it is of"),
        ({}, {"enable_lora": True}, "has enable_lora=True, no list of three, for q, k and v"),
        (
            {},
            {"enable_lora": [True, True, True]},
            "c_attn adapts 2 of q_proj, k_proj, v_proj; fused_targets=['q_",
        ),
    ],
)
def test_what_contradicts_loralibs_settings_is_refused(
    words: dict, changes: dict, message: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    save_file(build_loralib_state(["q_proj", "v_proj"], base[1], wrapped=False), tmp_path / "lora.safetensors")
    built = {"c_attn": {"r": 3, "lora_alpha": 16, "enable_lora": [True, False, True]} | changes}
    built["c_proj"] = {"r": 3, "lora_alpha": 16}
    modules = {f"transformer.h.{layer}.attn.{name}": built[name] for layer in range(4) for name in built}
    (tmp_path / "lora_settings.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        read_in(tmp_path / "lora.safetensors", tmp_path / "stored", base[1], format="loralib", **words)
    assert message.replace("PLACE", str(tmp_path)) in str(refusal.value)


def test_a_pickle_that_runs_code_is_refused(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Harmful()}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="is no file of tensors alone"):
        read_in(tmp_path / "lora.pt", tmp_path / "stored", base[1], format="loralib", alpha=1)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        read_in(tmp_path / "cut.safetensors", tmp_path / "stored", base[1], format="loralib", alpha=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["lm_head", "c_attn"]},
            "lm_head.lora_A.weight is a LoRA factor of the embedding or the output",
        ),
        ({"target_modules": ["wte", "c_attn"]}, "wte.lora_embedding_A is a LoRA factor of the embedding or the output"),
    ],
)
def test_factors_outside_the_layers_are_told_so(
    changes: dict, message: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", r=2, **changes)
    with pytest.raises(ValueError, match="which can only be trained whole here") as caught:
        read_in(tmp_path / "source", tmp_path / "stored", base[1])
    assert message in str(caught.value)


def test_pickled_weights_are_not_read(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2)
    (tmp_path / "source/adapter_model.safetensors").rename(tmp_path / "source/adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin alone, which could run code when it is read"):
        read_in(tmp_path / "source", tmp_path / "stored", base[1])


def test_what_is_dropped_is_a_regular_expression() -> None:
    tensors = {"a.x": torch.ones(1), "b.x": torch.ones(1), "b.y": torch.ones(1)}
    assert list(drop_keys(tensors, [r"b\..*"])) == ["a.x"]
    with pytest.raises(
        ValueError, match=r"drop: '\*foo' is no regular expression \(nothing to repeat.*any text is \.\*"
    ):
        drop_keys(tensors, ["*foo"])
    with pytest.raises(ValueError, match="drop: 'c' matches no key of the source"):
        drop_keys(tensors, ["c"])


@pytest.mark.parametrize("linear", ["block_sparse_moe.experts.3.w1", "mlp.experts.3.down_proj"])
def test_adapters_on_single_experts_are_refused(linear: str, tmp_path: Path) -> None:
    model = write_family_checkpoint("mixtral", tmp_path / "base")
    source = tmp_path / "source"
    write_with_peft(build_family_model("mixtral"), source, target_modules=["q_proj"], r=2)
    tensors = load_file(source / "adapter_model.safetensors")
    place = f"base_model.model.model.layers.0.{linear}"
    factors = {f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(48, 2)}
    save_file(tensors | factors, source / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{linear}.*base is mixtral, which has no such linear"):
        read_in(source, tmp_path / "stored", model)
