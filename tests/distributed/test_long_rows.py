"""DeepSeek-V3.2 and GLM-5 in rows longer than what their indexers pick: as transformers, at every topology."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from family_toy import StayDouble, build_family_model, read_family_config, write_family_checkpoint
from fp8_files import write_fp8_checkpoint
from generation_judge import choose_end_tokens, generate_with_transformers
from hf_toy import (
    VOCAB_SIZE,
    build_run_config,
    build_shard,
    compute_logits,
    count_processes,
    draw_adapter_values,
)
from latent_toy import ATTENDED
from processes import run_distributed
from tiers import few_of
from toy import gather_whole

from lora_dist.base_shapes import compute_indexer_shapes
from lora_dist.batch import Batch
from lora_dist.checkpoint.store import Adapter, write_adapter_directory
from lora_dist.config import LoraConfig, TopologyConfig
from lora_dist.files.hf_deepseek_v32 import name_indexer_tensor
from lora_dist.generation.batches import pad_left
from lora_dist.generation_config import GenerationConfig
from lora_dist.gradients import sum_tp_partial_gradients
from lora_dist.long_rows import check_long_rows
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore import indexer, selected_attention
from lora_dist.mcore.adapters import apply_lora
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.incremental import compute_cache_bytes, open_incremental
from lora_dist.mcore.indexer_weights import open_indexers
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.schedule import forward_backward
from lora_dist.needed_bytes import compute_state_bytes
from lora_dist.whole import cut_shard

NAMES = ["deepseek_v32", "glm_moe_dsa"]
LONG = 60
TOPOLOGIES = {
    "deepseek_v32": [{}, {"tp_size": 2, "sequence_parallel": True}],
    "glm_moe_dsa": [{"tp_size": 4}, {"tp_size": 2, "pp_size": 2, "sequence_parallel": True}],
}
LORA = LoraConfig(rank=3, alpha=4, target_modules=["q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"])


def draw_tokens(num_rows: int, num_positions: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_rows, num_positions), generator=torch.Generator().manual_seed(7))


def build_long(options: dict, base: Path, dtype: torch.dtype) -> ShardedGpt:
    """Its queries in chunks of 13."""
    indexer.QUERIES_AT_ONCE = selected_attention.QUERIES_AT_ONCE = 13
    gpt = build_shard(options, read_family_config(base), dtype)
    load_hf_checkpoint(gpt, base)
    open_indexers(gpt, LONG)
    return gpt


def compute_ours(options: dict, base: Path) -> torch.Tensor | None:
    return compute_logits(build_long(options, base, torch.float32), draw_tokens(2, LONG))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path)
    with torch.no_grad():
        model = build_family_model(name)
        expected = model(draw_tokens(2, LONG)).logits
        for layer in model.model.layers:
            if layer.self_attn.indexer is not None:
                layer.self_attn.indexer.index_topk = LONG
        dense = model(draw_tokens(2, LONG)).logits
    assert (dense - expected)[:, ATTENDED:].abs().amax(-1).min() > 0.01
    for options in TOPOLOGIES[name]:
        results = run_distributed(compute_ours, count_processes(options), options, tmp_path)
        for logits in (result for result in results if result is not None):
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def build_packed(tokens_BS: torch.Tensor) -> Batch:
    """A long example and a short one in each row; every token is a target."""
    B, S = tokens_BS.shape
    positions_S = torch.cat([torch.arange(LONG), torch.arange(S - LONG)])
    return Batch(
        input_ids_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, 1),
        loss_mask_BS=torch.ones(B, S, dtype=torch.bool),
        position_ids_BS=positions_S.expand(B, -1),
        row_blocks=((LONG, S - LONG),) * B,
        row_ids_B=torch.arange(B),
        num_loss_tokens=B * S,
        num_tokens=B * S,
    )


def compute_gradients(options: dict, base: Path, in_blocks: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and every factor's whole gradient in fp64."""
    gpt = build_long(options, base, torch.float64)
    gpt.attends_in_blocks = in_blocks
    specs = build_adapter_specs(LORA, gpt.model)
    trainable, values = apply_lora(gpt, specs, bias="none", seed=0), draw_adapter_values(specs, gpt.model, "none")
    for one in trainable:
        one.parameter.data = cut_shard(values[one.name].double(), one, gpt.topology)
    loss, _ = forward_backward(gpt, [build_packed(draw_tokens(2, 64))], seed=0, step=0, scale_loss=None)
    sum_tp_partial_gradients(trainable, gpt.topology)
    return loss, {one.name: gather_whole(one.parameter.grad, one, gpt.topology) for one in trainable}


def compute_short(base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of short rows with indexers and without."""
    gpt = build_long({}, base, torch.float32)
    gpt.train()
    tokens_BS, blocks = draw_tokens(2, LONG), ((ATTENDED, LONG - ATTENDED),) * 2
    positions_BS = torch.cat([torch.arange(ATTENDED), torch.arange(LONG - ATTENDED)]).expand_as(tokens_BS)

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be picked")

    indexer.Indexer._make_keys = refuse  # type: ignore[assignment, method-assign]
    with_indexers = gpt(tokens_BS, positions_BS, blocks)
    gpt.indexes = False
    return with_indexers.detach(), gpt(tokens_BS, positions_BS, blocks).detach()


def test_rows_of_short_examples_need_no_indexer(tmp_path: Path) -> None:
    write_family_checkpoint("deepseek_v32", tmp_path)
    ((with_indexers, without),) = run_distributed(compute_short, 1, tmp_path)
    assert torch.equal(with_indexers, without)


def compute_theirs(name: str, base: Path, adapter: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Of PEFT on transformers, each example alone."""
    from peft import PeftModel

    model = read_family_config(base)
    specs = build_adapter_specs(LORA, model)
    content = Adapter(specs=specs, bias="none", values=draw_adapter_values(specs, model, "none"))
    write_adapter_directory(adapter, content, model, {"task": "toy"}, base_fingerprint="base")
    theirs = PeftModel.from_pretrained(build_family_model(name).double(), adapter, is_trainable=True)
    theirs.requires_grad_(True)  # what has no gradient StayDouble lets become fp32
    tokens_BS = draw_tokens(2, 64)
    with StayDouble():
        logits = torch.cat([theirs(tokens_BS[:, part]).logits for part in (slice(LONG), slice(LONG, None))], dim=1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS.roll(-1, 1).flatten())
    loss.backward()
    gradients = {}
    for spec in specs:
        stored = {"o_proj": "self_attn.o_proj", "kv_a_proj": "self_attn.kv_a_proj_with_mqa"}
        place = stored.get(spec.target, f"self_attn.{spec.target}")
        linear = theirs.get_submodule(f"base_model.model.model.layers.{spec.layer}.{place}")
        gradients[f"{spec.name}.lora_A"] = linear.lora_A["default"].weight.grad
        gradients[f"{spec.name}.lora_B"] = linear.lora_B["default"].weight.grad
    return loss.item(), gradients


@pytest.mark.parametrize("name", few_of(NAMES, "glm_moe_dsa"))
def test_gradients_of_adapters_are_those_of_peft(name: str, tmp_path: Path) -> None:
    write_family_checkpoint(name, tmp_path / "base")
    expected_loss, expected = compute_theirs(name, tmp_path / "base", tmp_path / "adapter")
    for options, in_blocks in (({}, True), ({"tp_size": 2, "sequence_parallel": True}, False)):
        work = options, tmp_path / "base", in_blocks
        for loss, gradients in run_distributed(compute_gradients, count_processes(options), *work):
            assert loss == pytest.approx(expected_loss, rel=1e-9)
            assert gradients.keys() == expected.keys()
            for key, gradient in expected.items():
                assert (gradients[key] - gradient).abs().max() < 1e-9 * gradient.abs().max(), key


GREEDY = GenerationConfig(max_new_tokens=12, batch_size=3)


def draw_prompts() -> list[list[int]]:
    """Some longer than what is picked, and some that become so."""
    return [draw_tokens(1, length)[0].tolist() for length in (50, 27, 40, 33, 24)]


def generate(options: dict, base: Path, end_tokens: list[int]) -> list[list[int]]:
    gpt = build_shard(options, read_family_config(base))
    load_hf_checkpoint(gpt, base)
    rows = generate_rows(gpt.requires_grad_(False), draw_prompts(), GREEDY, end_tokens=end_tokens)
    dist.barrier()
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_every_generated_token_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Padded on the left in batches, where transformers has each context alone."""
    write_family_checkpoint(name, tmp_path)
    model = build_family_model(name)
    end_tokens = choose_end_tokens(model)
    expected = generate_with_transformers(model, draw_prompts(), GREEDY, end_tokens)
    assert len({tuple(row) for row in expected}) > 1
    options = {"tp_size": 2, "pp_size": 2} if name == "deepseek_v32" else {"tp_size": 2}
    for rows in run_distributed(generate, count_processes(options), options, tmp_path, end_tokens):
        assert rows == expected


def weigh_cache(base: Path) -> tuple[int, int]:
    """Bytes kept of 2 rows of 12 tokens, and planned."""
    gpt = build_long({"tp_size": 2}, base, torch.float32)
    batch = pad_left(draw_tokens(2, 12).tolist(), range(2), (), torch.device("cpu"))
    with torch.no_grad(), open_incremental(gpt, num_rows=2, num_columns=12) as model:
        model.prefill(batch)
        kept = sum(module.cache.num_bytes for module in gpt.modules() if getattr(module, "cache", None) is not None)
    dist.barrier()
    return kept, compute_cache_bytes(gpt, num_rows=2, num_columns=12)


def test_an_indexer_keeps_one_key_a_token_whole_on_every_rank(tmp_path: Path) -> None:
    model = write_family_checkpoint("glm_moe_dsa", tmp_path)
    per_layer = model.kv_latent_size + model.rotary_size
    for kept, planned in run_distributed(weigh_cache, 2, tmp_path):
        assert kept == planned == 4 * 2 * 12 * (model.num_layers * per_layer + 2 * model.indexer_head_size)


def weigh_indexers(options: dict, base: Path, seq_len: int) -> tuple[int, int]:
    """Elements that they and the parameters have."""
    gpt = build_shard(options, read_family_config(base))
    open_indexers(gpt, seq_len)
    return sum(buffer.numel() for buffer in gpt.buffers()), sum(one.numel() for one in gpt.parameters())


def test_indexers_are_there_where_rows_are_longer_than_what_they_pick(tmp_path: Path) -> None:
    model = write_family_checkpoint("glm_moe_dsa", tmp_path)
    one = sum(map(prod, compute_indexer_shapes(model).values()))
    for options in ({"tp_size": 2}, {"pp_size": 2}):
        without = run_distributed(weigh_indexers, 2, options, tmp_path, ATTENDED)
        there = run_distributed(weigh_indexers, 2, options, tmp_path, ATTENDED + 1)
        expected = 2 // options.get("pp_size", 1) * one
        assert [buffers for buffers, _ in there] == [buffers + expected for buffers, _ in without]
        assert [parameters for _, parameters in there] == [parameters for _, parameters in without]
    config = build_run_config(model, topology=TopologyConfig(pp_size=2))
    short, long = (replace(config, data=replace(config.data, seq_len=ATTENDED + extra)) for extra in (0, 1))
    assert compute_state_bytes(long, 1, dp_size=1) == compute_state_bytes(short, 1, dp_size=1) + 4 * one


def read_indexers(base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    gpt = build_long({}, base, dtype)
    assert compute_logits(gpt, draw_tokens(2, LONG)).isfinite().all()
    return {key: buffer for key, buffer in gpt.named_buffers() if ".indexer." in key}


def test_indexers_out_of_fp8_are_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    source, fp8, plain = (tmp_path / part for part in ("source", "fp8", "plain"))
    write_family_checkpoint("deepseek_v32", source)
    stored = write_fp8_checkpoint(source, fp8, plain, block_size=(5, 7), dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16):
        (buffers,) = run_distributed(read_indexers, 1, fp8, dtype)
        assert len(buffers) == 5 * 4
        for key, buffer in buffers.items():
            layer, name = key.split(".")[2], key.rpartition(".")[2]
            value = stored[name_indexer_tensor(int(layer), name)]
            wide = name == "head_weight" and dtype == torch.float16
            assert buffer.dtype == (torch.float32 if wide else dtype)
            assert torch.equal(buffer, value.to(buffer.dtype))


def test_a_stage_that_begins_with_a_borrowed_choice_is_refused(tmp_path: Path) -> None:
    model = write_family_checkpoint("glm_moe_dsa", tmp_path)
    topology = TopologyConfig(pp_size=4)
    config = build_run_config(model, topology=topology)
    message = (
        rf"topology.pp_size=4: rows of {LONG} positions exceed model.attended_positions={ATTENDED}, and the stage that"
        " begins with layer 1 .*; set model.stages_begin_at_indexers=true"
    )
    with pytest.raises(ValueError, match=message):
        replace(config, data=replace(config.data, seq_len=LONG))
    with pytest.raises(ValueError, match=r"topology\.pp_size=4: rows of 61 positions"):
        check_long_rows(model, num_positions=61, pp_size=4)
    dropping = replace(model, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"model\.attention_dropout=0\.1: rows of 61 positions exceed"):
        check_long_rows(dropping, num_positions=61, pp_size=1)
    check_long_rows(dropping, num_positions=ATTENDED, pp_size=4)
