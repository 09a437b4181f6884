"""Whole modules of the base beside the adapters: gradients and training at every topology, PEFT's files, merging."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import read_in, write_with_peft
from family_toy import compute_family_logits
from hf_toy import (
    build_hf_model,
    build_shard,
    compute_hf_logits,
    compute_logits,
    count_processes,
    draw_adapter_values,
    draw_tokens,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_alone, run_distributed
from safetensors.torch import load_file, save_file
from test_dtypes import train as train_in
from test_family_adapters import compute_peft_logits
from test_parity import FEW, TOLERANCE, TOPOLOGIES, compute_error, run_case
from test_zero import Trained, assert_trained_alike, train, train_oracle
from tiers import exhaustive, few_of
from toy import Case

from lora_dist.checkpoint.adapter import load_adapter, write_adapter
from lora_dist.checkpoint.convert import export_adapter
from lora_dist.checkpoint.store import open_adapter
from lora_dist.cli.compose import compose_config
from lora_dist.config import LoraConfig, ZeroConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.mcore.live import LiveMerge, attach_adapters, attach_alone, load_shards
from lora_dist.parameters import find_source
from lora_dist.whole import cut_shard, read_value

MODULES = ["wte", "wpe", "ln_1", "ln_2", "ln_f"]
LORA = LoraConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj"], bias="lora_only", modules_to_save=MODULES)
HEAD = replace(LORA, modules_to_save=["wte"], bias="none")
MANY = [{"tp_size": 2}, {"tp_size": 2, "pp_size": 2}, {"pp_size": 4}, {"tp_size": 2, "dp_size": 2}]


@pytest.mark.parametrize("options", few_of(TOPOLOGIES, *FEW), ids=lambda options: str(Case(**options)))
def test_gradients_equal_one_process(options: dict) -> None:
    for lora in (LORA, HEAD):
        expected_loss, expected = run_case(Case(lora=lora))
        loss, actual = run_case(Case(lora=lora, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert compute_error(actual, expected) < TOLERANCE
        assert "embedding.word_embeddings.weight" in expected


@pytest.fixture(scope="module")
def oracle() -> Trained:
    return run_distributed(train_oracle, 1, Case(dtype=torch.float32, lora=LORA))[0]


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({"dp_size": 2}, 3),
        ({"tp_size": 2, "pp_size": 2}, 1),
        *exhaustive(
            ({"dp_size": 2}, 1),
            ({"pp_size": 2, "dp_size": 2}, 2),
            ({"tp_size": 2, "dp_size": 2, "sequence_parallel": True}, 2),
        ),
    ],
    ids=str,
)
def test_trains_like_plain_torch_under_zero(options: dict, stage: int, oracle: Trained) -> None:
    case = Case(dtype=torch.float32, lora=LORA, **options)
    results = run_distributed(train, case.world_size, case, ZeroConfig(stage=stage))
    assert_trained_alike(results, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("options", "stage"), [({"dp_size": 2}, 1), ({"tp_size": 2, "pp_size": 2}, 1)], ids=str)
def test_over_a_low_precision_base_they_train_in_fp32(dtype: torch.dtype, options: dict, stage: int) -> None:
    exact = run_alone(train_in, Case(lora=LORA, dtype=torch.float32), 0)[0]
    case = Case(lora=LORA, dtype=dtype, **options)
    for losses, _, dtypes in run_distributed(train_in, case.world_size, case, stage):
        assert losses == pytest.approx(exact, abs=0.02)
        assert dtypes == {"torch.float32"}


def build(options: dict, base: Path, lora: LoraConfig) -> tuple:
    model = read_toy_config(base)
    gpt, specs = build_shard(options, model), build_adapter_specs(lora, model)
    load_hf_checkpoint(gpt, base)
    trainable = apply_lora(gpt, specs, bias=lora.bias, seed=0, modules=lora.modules_to_save)
    return gpt, {"trainable": trainable, "specs": specs, "topology": gpt.topology, "model": model, "bias": lora.bias}


def write(options: dict, base: Path, target: Path, lora: LoraConfig) -> torch.Tensor | None:
    gpt, parts = build(options, base, lora)
    values = draw_adapter_values(parts["specs"], parts["model"], lora.bias, lora.modules_to_save)
    with torch.no_grad():
        for one in parts["trainable"]:
            one.parameter.copy_(cut_shard(values[find_source(one)], one, gpt.topology))
    write_adapter(
        target, **parts, modules=lora.modules_to_save, read=read_value, base_fingerprint="base", task="toy", step=1,
        metrics={},
    )  # fmt: skip
    return compute_logits(gpt)


def load(options: dict, base: Path, adapter: Path, lora: LoraConfig) -> torch.Tensor | None:
    gpt, parts = build(options, base, lora)
    load_adapter(adapter, **parts, modules=lora.modules_to_save, base_fingerprint="base")
    return compute_logits(gpt)


def merge(options: dict, base: Path, adapter: Path, target: Path) -> torch.Tensor | None:
    """The merged checkpoint; logits with the adapter beside the base."""
    model = read_toy_config(base)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, base)
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    stored = open_adapter(adapter, model=model, base_fingerprint="base")
    loaded, live = load_shards(gpt, "saved", stored.specs, stored.read().values), LiveMerge(gpt)
    live.merge(loaded)
    write_hf_checkpoint(gpt, target, model=model)
    live.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in gpt.named_parameters())
    with pytest.raises(ValueError, match="saved has trained modules, which the rows of a batch share"):
        attach_adapters(gpt, [loaded])
    attach_alone(gpt, loaded)
    return compute_logits(gpt)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "lora", [LORA, HEAD, replace(LORA, modules_to_save=["ln_f", "wpe"])], ids=["all", "wte", "two"]
)
def test_peft_reads_the_one_file_of_every_topology(lora: LoraConfig, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "base")
    check_topologies(tmp_path, lora, MANY)


def check_topologies(directory: Path, lora: LoraConfig, topologies: list[dict]) -> None:
    """Adapters over `directory/base`: PEFT's logits from one process's file, and the same file, logits and merged
    checkpoint at every topology.
    """
    base, one = directory / "base", directory / "one"
    run_distributed(write, 1, {}, base, one, lora)
    expected = compute_peft_logits(base, one)
    assert (expected - compute_family_logits(base, draw_tokens())).abs().max() > 0.1 * expected.abs().max()
    for number, options in enumerate(topologies):
        many, merged = directory / "many", directory / f"merged{number}"
        results = run_distributed(write, count_processes(options), options, base, many, lora)
        raw = [(each / "adapter_model.safetensors").read_bytes() for each in (one, many)]
        assert raw[0] == raw[1]
        loaded = run_distributed(load, count_processes(options), options, base, one, lora)
        beside = run_distributed(merge, count_processes(options), options, base, one, merged)
        for logits in (*results, *loaded, *beside, compute_family_logits(merged, draw_tokens())):
            assert logits is None or (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def write_pefts_own(tmp_path: Path, *, tie: bool = True, **options: Any) -> None:
    """PEFT trains embedding and output layer apart; here both get the same values, unless told otherwise."""
    write_with_peft(build_hf_model(), tmp_path / "source", target_modules=["c_attn"], r=2, **options)
    path = tmp_path / "source" / "adapter_model.safetensors"
    tensors = load_file(path)
    if tie and {"wte", "lm_head"} <= set(options.get("modules_to_save", [])):
        tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.transformer.wte.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})


def test_pefts_own_modules_come_in_and_go_out(tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path / "base")
    write_pefts_own(tmp_path, modules_to_save=["wte", "lm_head", "ln_1", "ln_f"])
    stored = read_in(tmp_path / "source", tmp_path / "stored", model)
    export_adapter(stored, tmp_path / "out", "peft")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "out")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    run_distributed(merge, 1, {}, tmp_path / "base", tmp_path / "stored", tmp_path / "merged")
    expected = compute_peft_logits(tmp_path / "base", tmp_path / "source")
    assert (compute_hf_logits(tmp_path / "merged") - expected).abs().max() < 1e-5 * expected.abs().max()
    for format in ("loralib", "bridge", "peft_split"):
        with pytest.raises(ValueError, match=f"format={format} has no place for the modules ln_1, ln_f, wte"):
            export_adapter(stored, tmp_path / format, format)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["wte"]}, "unties the output layer from the embedding, which are one here; both or none"),
        ({"modules_to_save": ["lm_head"]}, "unties the output layer from the embedding"),
        ({"modules_to_save": ["wte", "lm_head"], "tie": False}, "lm_head.weight is not the embedding"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save names mlp; only wte, wpe, ln_1, ln_2, ln_f, lm_head can be"),
        ({"modules_to_save": ["ln_1"], "bias": "all"}, "both hold the norms' biases"),
    ],
)
def test_what_this_model_cannot_hold_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path / "base")
    write_pefts_own(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        read_in(tmp_path / "source", tmp_path / "stored", model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.modules_to_save=[lm_head]"], "lora.modules_to_save='lm_head' is not one of wte, wpe, ln_1, ln_2, ln_f"),
        (["lora.modules_to_save=[ln_f]", "lora.bias=all"], "use lora.bias=lora_only or none"),
    ],
)
def test_a_wrong_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(["experiment=debug/tiny_lora", *overrides])
