"""Generation over shards: token for token what transformers generates, at every topology, from any kind of model."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from generation_judge import (
    GREEDY,
    MAX_NEW_TOKENS,
    PAPER,
    choose_end_tokens,
    draw_prompts,
    generate_with_transformers,
)
from hf_toy import (
    VOCAB_SIZE,
    build_hf_model,
    build_shard,
    compute_hf_logits,
    count_processes,
    draw_adapter_values,
    draw_tokens,
    read_toy_config,
    write_toy_checkpoint,
)
from processes import run_distributed
from tiers import exhaustive
from toy import Case, build_case
from transformers import GPT2LMHeadModel

from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, OptimConfig, ZeroConfig
from lora_dist.generation.batches import pad_left
from lora_dist.generation.decode import Choice
from lora_dist.generation_config import GenerationConfig
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.incremental import compute_cache_bytes, open_incremental
from lora_dist.mcore.live import LiveMerge, LoadedAdapter, attach_adapters, load_shards
from lora_dist.mcore.model import ShardedGpt
from lora_dist.zero.engine import build_zero_engine

TOPOLOGIES = [
    {},
    {"tp_size": 2},
    {"pp_size": 2},
    {"tp_size": 2, "pp_size": 2},
    {"pp_size": 3},
    {"dp_size": 2},
    {"tp_size": 2, "dp_size": 2},
]
DRAWN = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, temperature=1.5, top_k=40, top_p=0.95, seed=3, batch_size=2)


def open_toy(options: dict, base: Path) -> ShardedGpt:
    gpt = build_shard(options, read_toy_config(base))
    load_hf_checkpoint(gpt, base)
    return gpt.requires_grad_(False)


def generate(options: dict, base: Path, config: GenerationConfig, end_tokens: list[int]) -> list[list[int]]:
    rows = generate_rows(open_toy(options, base), draw_prompts(), config, end_tokens=end_tokens)
    dist.barrier()
    return rows


@pytest.mark.parametrize("options", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("config", [GREEDY, replace(PAPER, num_beams=4)], ids=["greedy", "beam"])
def test_every_token_is_that_of_transformers(options: dict, config: GenerationConfig, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    end_tokens = choose_end_tokens(build_hf_model())
    expected = generate_with_transformers(build_hf_model(), draw_prompts(), config, end_tokens)
    assert len({len(row) for row in expected}) > 1
    for rows in run_distributed(generate, count_processes(options), options, tmp_path, config, end_tokens):
        assert rows == expected


def test_the_papers_settings_and_any_batch_size(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    end_tokens = choose_end_tokens(build_hf_model())
    expected = generate_with_transformers(build_hf_model(), draw_prompts(), PAPER, end_tokens)
    for batch_size in (1, 5):
        config = replace(PAPER, batch_size=batch_size)
        assert run_distributed(generate, 2, {"tp_size": 2}, tmp_path, config, end_tokens)[1] == expected


def test_what_is_drawn_is_the_same_at_every_topology_and_batch_size(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    reference = run_distributed(generate, 1, {}, tmp_path, DRAWN, [VOCAB_SIZE - 1])[0]
    assert len({tuple(row) for row in reference}) == len(reference)
    assert reference != run_distributed(generate, 1, {}, tmp_path, replace(DRAWN, seed=4), [VOCAB_SIZE - 1])[0]
    for options in TOPOLOGIES:
        config = replace(DRAWN, batch_size=len(options) + 1)
        for rows in run_distributed(generate, count_processes(options), options, tmp_path, config, [VOCAB_SIZE - 1]):
            assert rows == reference


def run_in_steps(options: dict, base: Path) -> tuple[torch.Tensor | None, int, int]:
    """Logits of the last position after a prompt of 4 and after each of 12 further tokens; bytes kept, and planned."""
    gpt, tokens_BS = open_toy(options, base), draw_tokens()
    batch = pad_left(tokens_BS[:, :4].tolist(), range(len(tokens_BS)), (), torch.device("cpu"))
    rows = torch.arange(len(tokens_BS))
    with torch.no_grad(), open_incremental(gpt, num_rows=2, num_columns=16) as model:
        logits = [model.prefill(batch)]
        for column in range(4, 16):
            logits.append(model.step(Choice(tokens_R=tokens_BS[:, column], source_R=rows, finished=False)))
        kept = sum(layer.self_attention.core_attention.cache.num_bytes for layer in gpt.decoder.layers)
    planned = compute_cache_bytes(gpt, num_rows=2, num_columns=16)
    dist.barrier()
    return None if logits[0] is None else torch.stack(logits, 1), kept, planned


@pytest.mark.parametrize("options", TOPOLOGIES[:4], ids=str)
def test_logits_with_the_cache_are_those_without(options: dict, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    expected = compute_hf_logits(tmp_path)[:, 3:]
    results = run_distributed(run_in_steps, count_processes(options), options, tmp_path)
    (logits,) = [logits for logits, *_ in results if logits is not None]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for _, kept, planned in results:
        assert kept == planned == 2 * 4 * 2 * 16 * 32 * 4 // count_processes(options)


def count_tokens(base: Path, config: GenerationConfig) -> int:
    """Tokens that pass through one layer's first linear while two prompts of 12 are continued."""
    gpt, counted = open_toy({}, base), []
    linear = gpt.decoder.layers[1].self_attention.linear_qkv
    linear.register_forward_pre_hook(lambda _, inputs: counted.append(inputs[0].shape[:2].numel()))
    generate_rows(gpt, [list(range(12)), list(range(20, 32))], config, end_tokens=[VOCAB_SIZE - 1])
    return sum(counted)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_token_is_computed_twice(num_beams: int, tmp_path: Path) -> None:
    """The prompt once, also for a beam search, then one token a row and step; the last one never."""
    write_toy_checkpoint(tmp_path)
    config = GenerationConfig(max_new_tokens=10, num_beams=num_beams, early_stopping="exhaustive")
    assert run_distributed(count_tokens, 1, tmp_path, config) == [2 * 12 + 2 * num_beams * 9]


LORAS = [
    LoraConfig(rank=3, target_modules=["q_proj", "v_proj"]),
    LoraConfig(rank=1, alpha=4, target_modules=["all-linear"]),
]
ADAPTER_OF_ROW = (0, None, 1, 1, 0)


def load_adapters(gpt: ShardedGpt, base: Path) -> list[LoadedAdapter]:
    model, adapters = read_toy_config(base), []
    for index, lora in enumerate(LORAS):
        specs = build_adapter_specs(lora, model)
        adapters.append(load_shards(gpt, f"task{index}", specs, draw_adapter_values(specs, model, "none")))
    return adapters


def generate_mixed(options: dict, base: Path, config: GenerationConfig, end_tokens: list[int]) -> list[list[int]]:
    gpt = open_toy(options, base)
    attach_adapters(gpt, load_adapters(gpt, base))
    return generate_rows(gpt, draw_prompts(), config, end_tokens=end_tokens, adapter_of_row=ADAPTER_OF_ROW)


def generate_from_one(options: dict, base: Path, config: GenerationConfig, end_tokens: list[int]) -> list[list[int]]:
    """With one adapter in the linears as in training, and then merged: both alike."""
    gpt = open_toy(options, base)
    adapter = load_adapters(gpt, base)[0]
    gpt.train()
    for name, shard in adapter.shards.items():
        gpt.get_submodule(name).lora = shard
    beside = generate_rows(gpt, draw_prompts(), config, end_tokens=end_tokens)
    for name in adapter.shards:
        gpt.get_submodule(name).lora = None
    LiveMerge(gpt).merge(adapter)
    assert generate_rows(gpt, draw_prompts(), config, end_tokens=end_tokens) == beside
    return beside


def write_with_peft_files(base: Path, target: Path, lora: LoraConfig) -> Path:
    model = read_toy_config(base)
    specs = build_adapter_specs(lora, model)
    adapter = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(target, adapter, model, {}, base_fingerprint="base")
    return target


def open_with_peft(base: Path, adapter: Path) -> GPT2LMHeadModel:
    """transformers' model with PEFT's own reading of the adapter merged in."""
    from peft import PeftModel

    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"tp_size": 2, "pp_size": 2}, replace(PAPER, num_beams=4)),
        *exhaustive(({"tp_size": 2}, GREEDY), ({"dp_size": 2}, GREEDY)),
    ],
    ids=["beam", "greedy-tp", "greedy-dp"],
)
def test_each_row_is_what_its_adapter_alone_generates(options: dict, config: GenerationConfig, tmp_path: Path) -> None:
    """transformers and PEFT generate each row from its adapter, or from the base, and neither knows of the mixture."""
    base = tmp_path / "base"
    write_toy_checkpoint(base)
    models: list[GPT2LMHeadModel] = [
        open_with_peft(base, write_with_peft_files(base, tmp_path / f"adapter{index}", lora))
        for index, lora in enumerate(LORAS)
    ]
    models.append(build_hf_model())
    end_tokens = choose_end_tokens(models[-1])
    alone = [generate_with_transformers(model, draw_prompts(), config, end_tokens) for model in models]
    expected = [alone[-1 if chosen is None else chosen][row] for row, chosen in enumerate(ADAPTER_OF_ROW)]
    assert expected[0] != alone[-1][0]
    for rows in run_distributed(generate_mixed, count_processes(options), options, base, config, end_tokens):
        assert rows == expected
    for rows in run_distributed(generate_from_one, count_processes(options), options, base, config, end_tokens):
        assert rows == alone[0]


def refuse_partitioned() -> str:
    case = Case(dp_size=2, dtype=torch.float32)
    gpt, trainable, topology = build_case(case)
    build_zero_engine(
        gpt,
        trainable,
        zero=ZeroConfig(stage=3),
        optim=OptimConfig(),
        micro_batch_size=1,
        dtype=torch.float32,
        topology=topology,
    )
    with pytest.raises(ValueError, match=r"zero\.stage") as caught:
        generate_rows(gpt, [[1]], GREEDY, end_tokens=[0])
    dist.barrier()
    return str(caught.value)


def test_a_partitioned_base_is_refused() -> None:
    for message in run_distributed(refuse_partitioned, 2):
        assert "generate from the saved adapter, or use zero.stage<=2" in message


def refuse_what_is_not_finite(base: Path, dtype: torch.dtype) -> str:
    gpt = build_shard({"tp_size": 2, "pp_size": 2}, read_toy_config(base), dtype)
    load_hf_checkpoint(gpt, base)
    rows = generate_rows(gpt, draw_prompts(), GREEDY, end_tokens=[VOCAB_SIZE - 1])
    assert {token for row in rows for token in row} <= set(range(VOCAB_SIZE))
    gpt.decoder.layers[0].mlp.linear_fc2.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite") as caught:
        generate_rows(gpt, draw_prompts(), GREEDY, end_tokens=[VOCAB_SIZE - 1])
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_not_finite_are_refused_on_every_process(dtype: torch.dtype, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, dtype=dtype)
    for message in run_distributed(refuse_what_is_not_finite, 4, tmp_path, dtype):
        assert "logits after 12 tokens are not finite" in message


def refuse_for_memory(base: Path, num_columns: int) -> str:
    gpt = build_shard({"tp_size": 2}, replace(read_toy_config(base), max_position_embeddings=num_columns))
    config = GenerationConfig(max_new_tokens=num_columns - 3, num_beams=50)
    with pytest.raises(ValueError, match="more than a process has free") as caught:
        generate_rows(gpt, [[1, 2, 3]] * 8, config, end_tokens=[0])
    return str(caught.value)


def test_more_keys_and_values_than_memory_are_refused_with_the_numbers(tmp_path: Path) -> None:
    """400 rows in four layers of half the heads of hidden size 32, fp32, twice the memory of this machine."""
    write_toy_checkpoint(tmp_path)
    bytes_per_column = 400 * 4 * 2 * 16 * 4
    num_columns = 2 * psutil.virtual_memory().total // bytes_per_column
    gib = (num_columns - 1) * bytes_per_column / 2**30
    for message in run_distributed(refuse_for_memory, 2, tmp_path, num_columns):
        assert f"of 400 rows of {num_columns - 1} tokens take {gib:.1f} GiB a process" in message


def refuse(options: dict, base: Path, prompts: list[list[int]], config: GenerationConfig) -> str:
    with pytest.raises(ValueError, match=r"generate\.|context") as caught:
        generate_rows(open_toy(options, base), prompts, config, end_tokens=[0])
    dist.barrier()
    return str(caught.value)


def test_what_cannot_run_is_refused_on_every_process(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    for message in run_distributed(refuse, 2, {"pp_size": 2}, tmp_path, [[1] * 20], GREEDY):
        assert "context 1 has 20 tokens" in message
        assert "model.max_position_embeddings=32" in message
    message = run_distributed(refuse, 1, {}, tmp_path, [[1]], replace(GREEDY, num_beams=60))[0]
    assert "weighs 120 tokens, but the vocabulary has 101" in message
