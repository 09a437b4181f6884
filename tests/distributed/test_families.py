"""Every family over shards: transformers' logits from transformers' files, and the files back bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, UNLIKE, VOCAB_SIZE
from family_toy import build_family_model, compute_family_logits, read_family_config, write_family_checkpoint
from hf_toy import build_run_config, build_shard, compute_logits, count_processes, draw_tokens
from processes import run_distributed
from safetensors.torch import load_file
from tiers import exhaustive, few_of

from lora_dist.base_shapes import count_parameters
from lora_dist.config import TopologyConfig
from lora_dist.files.hf_checkpoint import check_hf_checkpoint
from lora_dist.mcore.hf_weights import load_hf_checkpoint, write_hf_checkpoint
from lora_dist.needed_bytes import compute_state_bytes
from lora_dist.plan.search import compute_weight_bytes

pytestmark = pytest.mark.usefixtures("small_tiles")

EVERY_SPLIT = {"tp_size": 2, "pp_size": 2, "sequence_parallel": True}
TOPOLOGIES = [
    *({}, {"tp_size": 2}, {"tp_size": 4}, {"pp_size": 2}, {"pp_size": 3}, {"tp_size": 2, "sequence_parallel": True})
]
CASES = [
    *(("llama", options) for options in TOPOLOGIES),
    *exhaustive(*((name, {"tp_size": 4}) for name in FAMILIES if name != "llama")),
    *((name, EVERY_SPLIT) for name in (*UNLIKE, "glm_moe_dsa")),
    *exhaustive(*((name, EVERY_SPLIT) for name in FAMILIES if name not in (*UNLIKE, "glm_moe_dsa"))),
]


def load_compute_and_write(options: dict, source: Path, target: Path) -> torch.Tensor | None:
    model = read_family_config(source)
    gpt = build_shard(options, model)
    load_hf_checkpoint(gpt, source)
    write_hf_checkpoint(gpt, target, model=model, max_shard_bytes=60_000)
    return compute_logits(gpt)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_logits_equal_transformers_and_files_come_back(name: str, options: dict, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    check_hf_checkpoint(write_family_checkpoint(name, source), source)
    expected = compute_family_logits(source, draw_tokens())
    results = run_distributed(load_compute_and_write, count_processes(options), options, source, target)
    logits = [result for result in results if result is not None]
    assert logits
    assert expected.abs().max() > 1
    for actual in logits:
        assert (actual - expected).abs().max() < 1e-4
    check_hf_checkpoint(read_family_config(source), target)
    stored = load_file(source / "model.safetensors")
    written = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())
    assert torch.equal(compute_family_logits(target, draw_tokens()), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    counted = [one.numel() for key, one in build_family_model(name).named_parameters() if ".indexer." not in key]
    assert count_parameters(model) == sum(counted)


def write_drawn(options: dict, source: Path, target: Path) -> None:
    from lora_dist.mcore.base_parameters import initialize_base

    model = read_family_config(source)
    model.checkpoint = None
    gpt = build_shard(options, model)
    initialize_base(gpt, model, seed=3)
    write_hf_checkpoint(gpt, target, model=model)


@pytest.mark.parametrize(
    "name",
    few_of(
        ["llama", "qwen3", "opt", "gpt_neox_serial", "qwen3_next", "minimax_m2", "deepseek_v3", "gpt_oss"],
        *("opt", "gpt_oss"),
    ),
)
def test_a_drawn_model_is_the_same_at_every_topology_and_transformers_reads_it(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = write_family_checkpoint(name, source)
    for number, options in enumerate(({}, {"tp_size": 2, "pp_size": 2})):
        run_distributed(write_drawn, count_processes(options), options, source, tmp_path / str(number))
    files = [load_file(tmp_path / str(number) / "model.safetensors") for number in (0, 1)]
    assert all(torch.equal(files[0][key], tensor) for key, tensor in files[1].items())
    check_hf_checkpoint(model, tmp_path / "0")
    assert compute_family_logits(tmp_path / "0", draw_tokens()).isfinite().all()


def weigh(options: dict, source: Path) -> int:
    return sum(parameter.nbytes for parameter in build_shard(options, read_family_config(source)).parameters())


@pytest.mark.parametrize(
    "name",
    few_of(
        ["llama", "qwen3", "opt", "qwen3_next", "glm4_moe", "minimax_m2", "deepseek_v3", "gpt_oss"],
        *("llama", "qwen3_next", "deepseek_v3"),
    ),
)
def test_the_planned_weights_are_the_fullest_processs(name: str, tmp_path: Path) -> None:
    model = write_family_checkpoint(name, tmp_path)
    for tp_size, pp_size in ((2, 2), (4, 1), (1, 3)):
        options = {"tp_size": tp_size, "pp_size": pp_size}
        weights = run_distributed(weigh, count_processes(options), options, tmp_path)
        assert max(weights) == compute_weight_bytes(model, "fp32", tp_size=tp_size, pp_size=pp_size)
    for pp_size in (2, 3):
        config = build_run_config(model, topology=TopologyConfig(pp_size=pp_size))
        stages = [compute_state_bytes(config, pp_rank, dp_size=1) for pp_rank in range(pp_size)]
        copies = model.vocab_size * model.hidden_size if model.tied_output else 0
        assert sum(stages) == 4 * (count_parameters(model) + copies)


def drop_all(source: Path) -> torch.Tensor:
    """Logits in training, of a model that drops all that a layer gives."""
    gpt = build_shard({}, replace(read_family_config(source), hidden_dropout=1 - 1e-9))
    load_hf_checkpoint(gpt, source)
    tokens_BS = draw_tokens()
    logits: torch.Tensor = gpt.train()(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)
    return logits[..., :VOCAB_SIZE].detach()


def test_a_seed_oss_drops_in_training_what_transformers_drops(tmp_path: Path) -> None:
    """What attention and the MLP give, and not the embedding."""
    write_family_checkpoint("seed_oss", tmp_path)
    theirs = build_family_model("seed_oss").train()
    for layer in theirs.model.layers:
        layer.self_attn.residual_dropout = layer.mlp.residual_dropout = 1.0
    (logits,) = run_distributed(drop_all, 1, tmp_path)
    torch.testing.assert_close(logits, theirs(draw_tokens()).logits.detach(), rtol=1e-4, atol=1e-4)
