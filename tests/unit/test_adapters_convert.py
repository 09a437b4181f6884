"""Adapters of PEFT and loralib in and out: the same logits, and the same tensors and settings after a round trip."""

import json
import resource
from pathlib import Path

import peft
import pytest
import torch
from adapter_files import build_loralib_state, read_in, write_with_peft
from hf_toy import build_hf_model, compute_peft_logits, draw_tokens, write_toy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import StoredAdapter
from lora_dist.config import ModelConfig
from lora_dist.files.base_values import to_stored
from lora_dist.files.bridge import to_bridge
from lora_dist.files.loralib import read_state_dict
from lora_dist.lora.layer import compute_qkv_rows

FUSED = {
    "plain": {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 12},
    "all_linears": {"target_modules": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"], "r": 2},
    "patterns": {
        "target_modules": ["c_attn", "c_fc"],
        "r": 2,
        "rank_pattern": {"c_fc": 5, r"h\.1\.attn\.c_attn": 1},
        "alpha_pattern": {"c_fc": 3},
    },
    "rslora": {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "use_rslora": True},
    "bias": {"target_modules": ["c_attn"], "r": 2, "bias": "all"},
    "layers": {"target_modules": ["c_fc"], "r": 1, "layers_to_transform": [1, 3], "layers_pattern": "h"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("base")
    return directory, write_toy_checkpoint(directory)


def assert_same_tensors(one: Path, other: Path) -> None:
    expected, actual = load_file(one), load_file(other)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == actual[key].dtype
        assert torch.equal(tensor, actual[key]), key


@pytest.mark.parametrize("case", FUSED)
def test_pefts_fused_adapters_compute_the_same_and_come_back(
    case: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    write_with_peft(GPT2LMHeadModel.from_pretrained(base[0]), tmp_path / "source", **FUSED[case])
    stored = read_in(tmp_path / "source", tmp_path / "stored", base[1])
    expected = compute_peft_logits(base[0], tmp_path / "source")
    assert (compute_peft_logits(base[0], tmp_path / "stored") - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (compute_merged_logits(base[0], stored) - expected).abs().max() < 1e-5 * expected.abs().max()
    export_adapter(stored, tmp_path / "out", "peft")
    assert_same_tensors(tmp_path / "source/adapter_model.safetensors", tmp_path / "out/adapter_model.safetensors")
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("source", "out")]
    assert raw[0] == raw[1]


@torch.no_grad()
def compute_merged_logits(base: Path, stored: StoredAdapter) -> torch.Tensor:
    """transformers' model with the canonical adapters added into its weights."""
    model, adapter = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32).eval(), stored.read()
    modules = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
    for spec in adapter.specs:
        update = spec.scaling * adapter.values[f"{spec.name}.lora_B"] @ adapter.values[f"{spec.name}.lora_A"]
        weight = model.transformer.h[spec.layer].get_submodule(modules.get(spec.target, "attn.c_attn")).weight
        column = "qkv".find(spec.target[0]) * spec.out_features if spec.target not in modules else 0
        weight[:, column : column + spec.out_features] += update.t()
    biases = [name for name in adapter.values if name.endswith("bias")]
    for name, value in to_stored(adapter.values, biases, stored.model).items():
        model.transformer.get_parameter(name).copy_(value)
    return model(draw_tokens()).logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sources_dtype_is_kept(dtype: torch.dtype, base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", dtype, target_modules=["c_attn"], r=2)
    stored = read_in(tmp_path / "source", tmp_path / "stored", base[1])
    assert stored.dtype == dtype
    export_adapter(stored, tmp_path / "out", "peft")
    assert_same_tensors(tmp_path / "source/adapter_model.safetensors", tmp_path / "out/adapter_model.safetensors")


def build_opt(model: ModelConfig) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        ffn_dim=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        max_position_embeddings=32,
        word_embed_proj_dim=model.hidden_size,
    )
    return OPTForCausalLM(config)


def test_one_adapter_a_projection_comes_in_and_goes_out_as_it_was(
    base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    targets = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]
    patterns = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"fc1": 5}}
    write_with_peft(build_opt(base[1]), tmp_path / "source", target_modules=targets, r=2, **patterns)
    stored = read_in(tmp_path / "source", tmp_path / "stored", base[1])
    source = load_file(tmp_path / "source/adapter_model.safetensors")
    prefix = "base_model.model.model.decoder.layers.3"
    values = stored.read().values
    for theirs, ours in {"self_attn.q_proj": "q_proj", "self_attn.out_proj": "o_proj", "fc2": "down_proj"}.items():
        for kind in ("lora_A", "lora_B"):
            assert torch.equal(values[f"layers.3.{ours}.{kind}"], source[f"{prefix}.{theirs}.{kind}.weight"])
    by_name = {spec.name: (spec.lora_rank, spec.alpha) for spec in stored.specs}
    assert by_name["layers.1.v_proj"] == (4, 8)
    assert by_name["layers.1.up_proj"] == (2, 5)
    export_adapter(stored, tmp_path / "out", "peft_split")
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("source", "out")]
    assert raw[0] == raw[1]
    for name in ("source", "out"):
        assert '"lora_alpha": 8,' in (tmp_path / name / "adapter_config.json").read_text()  # no 8.0
    again = read_in(tmp_path / "out", tmp_path / "again", base[1])
    assert again.specs == stored.specs
    # PEFT itself puts the exported files on a model whose projections are apart
    loaded = peft.PeftModel.from_pretrained(build_opt(base[1]), tmp_path / "out")
    module = loaded.base_model.model.model.decoder.layers[1]
    assert module.self_attn.v_proj.scaling["default"] == 8 / 4
    assert module.fc1.scaling["default"] == 5 / 2
    # and the fused form of the same adapter is for GPT-2
    assert compute_peft_logits(base[0], tmp_path / "stored").isfinite().all()


def test_own_adapters_without_a_source_get_llamas_names(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2)
    stored = read_in(tmp_path / "source", tmp_path / "stored", base[1])
    export_adapter(stored, tmp_path / "out", "peft_split")
    keys = load_file(tmp_path / "out/adapter_model.safetensors")
    assert "base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight" in keys
    assert len(keys) == 4 * 3 * 2


LORALIB_CASES = {
    "qv": ["q_proj", "v_proj"],
    "qkv": ["q_proj", "k_proj", "v_proj"],
    "k": ["k_proj"],
    "kv": ["k_proj", "v_proj"],
}


def compute_loralib_update(state: dict, targets: list[str], model: ModelConfig, alpha: float) -> torch.Tensor:
    """loralib's MergedLinear.merge_AB of layer 1, by its own grouped convolution: [3 H, H]."""
    a, b = state["transformer.h.1.attn.c_attn.lora_A"], state["transformer.h.1.attn.c_attn.lora_B"]
    delta = torch.nn.functional.conv1d(a[None], b[:, :, None], groups=len(targets))[0]
    whole = torch.zeros(3, model.hidden_size, model.hidden_size)
    whole[["qkv".index(target[0]) for target in targets]] = delta.view(len(targets), model.hidden_size, -1)
    return whole.flatten(0, 1) * alpha / 3


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", LORALIB_CASES)
def test_loralibs_state_dicts_mean_the_same_and_come_back(
    case: str, suffix: str, base: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    targets, model = LORALIB_CASES[case], base[1]
    state = build_loralib_state(targets, model, wrapped=suffix == ".pt")
    path = tmp_path / f"lora{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    state = state.get("model_state_dict", state)
    stored = read_in(path, tmp_path / "stored", model, format="loralib", alpha=16, fused_targets=targets)
    adapter = stored.read()
    h, update = model.hidden_size, torch.zeros(3 * model.hidden_size, model.hidden_size)
    for spec in adapter.specs:
        if spec.layer == 1 and spec.target != "o_proj":
            row = "qkv".index(spec.target[0]) * h
            update[row : row + h] = spec.scaling * (
                adapter.values[f"{spec.name}.lora_B"] @ adapter.values[f"{spec.name}.lora_A"]
            )
    torch.testing.assert_close(update, compute_loralib_update(state, targets, model, 16))
    export_adapter(stored, tmp_path / "out", "loralib")
    returned = torch.load(tmp_path / "out/lora.pt", weights_only=True)
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[key], value) for key, value in state.items())
    settings = json.loads((tmp_path / "out/lora_settings.json").read_text())["transformer.h.1.attn.c_attn"]
    assert settings == {"r": 3, "lora_alpha": 16, "enable_lora": [t in targets for t in ("q_proj", "k_proj", "v_proj")]}
    assert compute_peft_logits(base[0], tmp_path / "stored").isfinite().all()


PATTERNS = {"alpha_pattern": {"attn.c_proj": 3}, "rank_pattern": {"c_fc": 5, r"h\.1\.attn\.c_proj": 4}}


@pytest.mark.parametrize("case", ["patterns", "rslora", "kv"])
def test_loralibs_files_keep_every_scaling(case: str, base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    """By the settings that the export wrote beside them; alpha may be said again where it is the same."""
    if case == "kv":
        save_file(build_loralib_state(["k_proj", "v_proj"], base[1], wrapped=False), tmp_path / "lora.safetensors")
        words = {"format": "loralib", "alpha": 16.0, "fused_targets": ["k_proj", "v_proj"]}
        stored = read_in(tmp_path / "lora.safetensors", tmp_path / "stored", base[1], **words)
    else:
        options = PATTERNS if case == "patterns" else {"use_rslora": True} | PATTERNS
        write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["attn.c_proj", "c_fc"], r=2, **options)
        stored = read_in(tmp_path / "source", tmp_path / "stored", base[1])
    export_adapter(stored, tmp_path / "out", "loralib")
    again = read_in(tmp_path / "out/lora.pt", tmp_path / "again", base[1], format="loralib")
    scalings = {spec.name: spec.scaling for spec in stored.specs}
    assert len(set(scalings.values())) == (1 if case == "kv" else 3)
    assert {spec.name: spec.scaling for spec in again.specs} == pytest.approx(scalings)
    assert all(torch.equal(value, again.read().values[name]) for name, value in stored.read().values.items())
    if case == "kv":
        assert read_in(tmp_path / "out/lora.pt", tmp_path / "third", base[1], **words).specs == again.specs


def test_loralibs_file_that_has_no_room_is_named(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    state = build_loralib_state(["q_proj"], base[1], wrapped=False)
    save_file(state, tmp_path / "lora.safetensors")
    words = {"format": "loralib", "alpha": 16, "fused_targets": ["q_proj"]}
    stored = read_in(tmp_path / "lora.safetensors", tmp_path / "stored", base[1], **words)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # SIGXFSZ is ignored by Python
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"out cannot be written: .*; raise the limit on a file's size"):
            export_adapter(stored, tmp_path / "out", "loralib")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_the_authors_own_adapter_comes_back(tmp_path: Path) -> None:
    """Part of the file they published; its classifier has no place here and is left out by name."""
    source = Path(__file__).parents[1] / "data/roberta_mnli_lora_part.pt"
    model = ModelConfig(
        name="base",
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        ffn_hidden_size=3072,
        vocab_size=50265,
        max_position_embeddings=512,
    )
    options: dict = {"format": "loralib", "alpha": 16}
    with pytest.raises(ValueError, match=r"classifier.out_proj.weight is neither a LoRA factor nor a bias; leave it"):
        read_in(source, tmp_path / "refused", model, **options)
    assert not (tmp_path / "refused").exists()
    stored = read_in(source, tmp_path / "stored", model, drop=[r"classifier\..*"], **options)
    assert [spec.name for spec in stored.specs] == ["layers.0.q_proj", "layers.0.v_proj", "layers.11.v_proj"]
    assert {(spec.lora_rank, spec.scaling) for spec in stored.specs} == {(8, 2.0)}
    export_adapter(stored, tmp_path / "out", "loralib")
    returned = torch.load(tmp_path / "out/lora.pt", weights_only=True)
    published = {key: value for key, value in read_state_dict(source).items() if "classifier" not in key}
    assert returned.keys() == published.keys()
    assert all(torch.equal(returned[key], value) for key, value in published.items())


def test_bridges_names_and_rows(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    """linear_out linear_in times alpha / dim is the update on Megatron's interleaved rows."""
    model = base[1]
    patterns = {"rank_pattern": {"c_fc": 5}, "alpha_pattern": {"c_fc": 3}}
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn", "c_fc"], r=2, **patterns)
    adapter = read_in(tmp_path / "source", tmp_path / "stored", model).read()
    tensors, settings = to_bridge(adapter.values, adapter.specs, model, "none")
    assert settings["target_modules"] == ["linear_qkv", "linear_fc1"]
    rows = compute_qkv_rows(model.num_heads, 1, model.head_dim)
    for spec in adapter.specs:
        linear = "mlp.linear_fc1" if spec.target == "up_proj" else "self_attention.linear_qkv"
        name = f"decoder.layers.{spec.layer}.{linear}.adapter"
        a, b = tensors[f"{name}.linear_in.weight"], tensors[f"{name}.linear_out.weight"]
        assert a.shape[0] == settings["dim"]
        update = settings["alpha"] / settings["dim"] * b @ a
        expected = spec.scaling * adapter.values[f"{spec.name}.lora_B"] @ adapter.values[f"{spec.name}.lora_A"]
        actual = update[rows[spec.target]] if spec.target in rows else update
        torch.testing.assert_close(actual, expected)
