"""The adapter's files: PEFT computes from them what their factors mean, and they come back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_toy import build_run_config, compute_peft_logits, draw_adapter_values, draw_tokens, write_toy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from lora_dist.checkpoint.adapter import load_adapter
from lora_dist.checkpoint.store import Adapter, open_adapter, write_adapter_directory
from lora_dist.config import LoraConfig, ModelConfig, RunConfig
from lora_dist.files.base_values import to_stored
from lora_dist.files.directories import compute_sha256, write_manifest
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import build_adapter_specs

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    "q_v": LoraConfig(rank=4, alpha=32),
    "all": LoraConfig(rank=3, alpha=16, target_modules=ALL),
    "k": LoraConfig(rank=1, alpha=5, target_modules=["k_proj"]),
    "o_only": LoraConfig(rank=2, target_modules=["o_proj"]),
    "layers": LoraConfig(rank=2, target_modules=["v_proj", "down_proj"], layers=["1", "3"]),
    "mixed": LoraConfig(rank=2, target_modules=["q_proj", r"layers\.[01]\.down_proj", r"layers\.2\.o_proj"]),
    "ranks": LoraConfig(rank=2, alpha=8, target_modules=ALL, rank_pattern={"v_proj": 5, r"layers\.1\.up_proj": 7}),
    "alphas": LoraConfig(rank=2, target_modules=ALL, alpha_pattern={"k_proj": 3.0, "down_proj": 64.0}),
    "lora_only": LoraConfig(rank=2, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    "bias_all": LoraConfig(rank=2, target_modules=["v_proj"], layers=["2"], bias="all"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    directory = tmp_path_factory.mktemp("base")
    return directory, write_toy_checkpoint(directory)


def write(
    directory: Path, config: RunConfig, layout: str = "peft", dtype: torch.dtype = torch.float32
) -> tuple[list[AdapterSpec], dict[str, torch.Tensor]]:
    """What global rank 0 does in write_adapter; the specs and the values written."""
    specs = build_adapter_specs(config.lora, config.model)
    values = draw_adapter_values(specs, config.model, config.lora.bias)
    adapter = Adapter(specs=specs, bias=config.lora.bias, values=values)
    write_adapter_directory(directory, adapter, config.model, {}, base_fingerprint="base", layout=layout, dtype=dtype)
    return specs, values


@torch.no_grad()
def compute_merged_logits(
    base: Path, specs: list[AdapterSpec], values: dict[str, torch.Tensor], config: RunConfig
) -> torch.Tensor:
    """W + (alpha / r) B A, written out projection by projection on transformers' own model."""
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32).eval()
    modules = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
    for spec in specs:
        update = spec.alpha / spec.lora_rank * values[f"{spec.name}.lora_B"] @ values[f"{spec.name}.lora_A"]
        weight = model.transformer.h[spec.layer].get_submodule(modules.get(spec.target, "attn.c_attn")).weight
        column = "qkv".find(spec.target[0]) * spec.out_features if spec.target not in modules else 0
        weight[:, column : column + spec.out_features] += update.t()
    biases = [name for name in values if "lora_" not in name]
    for name, value in to_stored(values, biases, config.model).items():
        model.transformer.get_parameter(name).copy_(value)
    return model(draw_tokens()).logits


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_logits(case: str, base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    config = build_run_config(base[1], CASES[case])
    specs, values = write(tmp_path / "adapter", config)
    expected = compute_merged_logits(base[0], specs, values, config)
    actual = compute_peft_logits(base[0], tmp_path / "adapter")
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = compute_merged_logits(base[0], [], {}, config)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["peft", "compact"])
@pytest.mark.parametrize("case", CASES)
def test_values_come_back(case: str, layout: str, base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    config = build_run_config(base[1], CASES[case])
    specs, values = write(tmp_path / "adapter", config, layout)
    stored = open_adapter(tmp_path / "adapter", model=config.model, base_fingerprint="base")
    loaded = stored.read().values
    assert (stored.specs, stored.bias) == (specs, config.lora.bias)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    has_factors = (tmp_path / "adapter" / "adapter_factors.safetensors").exists()
    assert has_factors == (layout == "compact" or case in ("ranks", "alphas"))


def test_compact_fp16_has_the_papers_size(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    """2 bytes x lora_rank x (in + out) an adapter, and a header; at GPT-3 175B that is 37.75 MB."""
    config = build_run_config(base[1], CASES["q_v"])
    specs, values = write(tmp_path / "adapter", config, "compact", torch.float16)
    size = (tmp_path / "adapter" / "adapter_factors.safetensors").stat().st_size
    assert 0 < size - 2 * sum(spec.num_parameters for spec in specs) < 120 * len(values)
    gpt3 = ModelConfig(
        name="gpt3",
        num_layers=96,
        hidden_size=12288,
        num_heads=96,
        ffn_hidden_size=49152,
        vocab_size=50257,
        max_position_embeddings=2048,
    )
    num_bytes = 2 * sum(spec.num_parameters for spec in build_adapter_specs(CASES["q_v"], gpt3))
    assert num_bytes == 37_748_736


def test_default_rank_and_alpha_are_the_commonest(base: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    write(tmp_path / "adapter", build_run_config(base[1], CASES["ranks"]))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 2
    assert written["rank_pattern"]["transformer.h.0.attn.c_attn"] == 9
    assert written["rank_pattern"]["transformer.h.1.mlp.c_fc"] == 7
    assert "transformer.h.2.mlp.c_fc" not in written["rank_pattern"]
    assert written["fan_in_fan_out"] is True


@pytest.fixture
def written(base: tuple[Path, ModelConfig], tmp_path: Path) -> tuple[Path, RunConfig]:
    config = build_run_config(base[1], LoraConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    write(tmp_path / "adapter", config)
    return tmp_path / "adapter", config


def refuse(directory: Path, config: RunConfig, base_fingerprint: str = "base") -> str:
    specs = build_adapter_specs(config.lora, config.model)
    with pytest.raises(ValueError, match=r"adapter") as caught:
        load_adapter(
            directory,
            trainable=[],
            specs=specs,
            topology=None,  # type: ignore[arg-type]
            model=config.model,
            bias=config.lora.bias,
            base_fingerprint=base_fingerprint,
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        (LoraConfig(rank=4, target_modules=["q_proj", "down_proj"]), "q_proj.lora_rank is 2 there and 4 in this run"),
        (LoraConfig(rank=2, alpha=1, target_modules=["q_proj", "down_proj"]), "q_proj.alpha is 32.0 there and 1"),
        (LoraConfig(rank=2, target_modules=["q_proj"]), "layers.0.down_proj is {'lora_rank': 2"),
        (LoraConfig(rank=2, target_modules=["q_proj", "down_proj"], bias="all"), "bias is 'none' there and 'all'"),
    ],
)
def test_another_adapter_is_refused(lora: LoraConfig, named: str, written: tuple[Path, RunConfig]) -> None:
    assert named in refuse(written[0], build_run_config(written[1].model, lora))


def test_another_base_is_refused(written: tuple[Path, RunConfig]) -> None:
    assert "base_fingerprint is 'base' there and 'other' in this run" in refuse(*written, base_fingerprint="other")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_files_are_named(name: str, written: tuple[Path, RunConfig]) -> None:
    path = written[0] / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert f"{path} is damaged" in refuse(*written)
    path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:])
    assert f"{path} is damaged" in refuse(*written)
    path.unlink()
    assert f"{path} is missing" in refuse(*written)


def forge(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], **manifest: object) -> None:
    """Change the tensors and make the manifest fit them."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    content = json.loads((directory / "manifest.json").read_text()) | {"sha256": {}} | manifest
    hashes = content.pop("sha256") or {path.name: compute_sha256(path)}
    write_manifest(directory, hashes, content)


KEY = "base_model.model.transformer.h.1.mlp.c_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY: torch.zeros(1, 1)}), f"{KEY} has shape (1, 1), the model needs (2, 48)"),
        (lambda t: t.pop(KEY), f"{KEY} has shape none, the model needs (2, 48)"),
        (lambda t: t.update(more=torch.zeros(1)), "more has shape (1,), the model needs none"),
        (lambda t: t.update({KEY: torch.zeros(2, 48, dtype=torch.int64)}), f"{KEY} is I64, not one of"),
        (lambda t: t[KEY].fill_(float("nan")), f"{KEY} holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, written: tuple[Path, RunConfig]
) -> None:
    forge(written[0], change)
    assert message in refuse(*written)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"sha256": {"nothing": "x"}}, "nothing is missing"),
        ({"sha256": {"adapter_config.json": None}}, "lists no files"),
        ({"adapters": []}, "lists no adapters"),
        ({"adapters": {"layers.1.q_proj": 4}}, "layers.1.q_proj is 4, not a lora_rank and an alpha"),
        ({"adapters": {"layers.9.q_proj": {"lora_rank": 2, "alpha": 1}}}, "has no layers.9.q_proj; it has 4 layers"),
        ({"adapters": {"layers.1.gate": {"lora_rank": 2, "alpha": 1}}}, "has no layers.1.gate"),
        (
            {"adapters": {"layers.1.q_proj": {"lora_rank": 0, "alpha": 1}}},
            "layers.1.q_proj is {'lora_rank': 0, 'alpha': 1}",
        ),
        ({"bias": "some"}, "bias is 'some', not one of"),
    ],
)
def test_a_tampered_manifest_is_refused(
    manifest: dict[str, object], message: str, written: tuple[Path, RunConfig]
) -> None:
    forge(written[0], lambda tensors: None, **manifest)
    assert message in refuse(*written)


def test_weights_that_the_manifest_does_not_hash_are_refused(written: tuple[Path, RunConfig]) -> None:
    path = written[0] / "adapter_config.json"
    forge(written[0], lambda tensors: None, sha256={path.name: compute_sha256(path)})
    assert "lists neither adapter_factors.safetensors nor adapter_model.safetensors" in refuse(*written)


def test_an_adapter_from_elsewhere_is_sent_to_import(written: tuple[Path, RunConfig]) -> None:
    (written[0] / "manifest.json").unlink()
    assert "lora-dist import it" in refuse(*written)
    assert "is not a directory" in refuse(written[0] / "none", written[1])
