"""Which positions a context-parallel process has: each once, as much work for each, the same through every door."""

from dataclasses import replace

import pytest
import torch
from hf_toy import build_run_config

from lora_dist.config import DataConfig, LoraConfig, ModelConfig, TopologyConfig, ZeroConfig
from lora_dist.context_checks import check_row_length
from lora_dist.lora.dropout import DropoutMask, compute_row_keys
from lora_dist.mcore.context_attention import _list_spans
from lora_dist.needed_bytes import compute_needed_bytes
from lora_dist.row_shard import RowShard, number_parts, order_parts

S = 48
CPU = torch.device("cpu")


def list_shards(cp_size: int) -> list[RowShard]:
    return [RowShard(cp_size=cp_size, cp_rank=cp_rank) for cp_rank in range(cp_size)]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_each_position_is_somewhere_once(cp_size: int) -> None:
    row = torch.arange(S)[None]
    cut = [shard.cut(row)[0] for shard in list_shards(cp_size)]
    assert torch.cat(cut).sort().values.equal(row[0])
    for shard, mine in zip(list_shards(cp_size), cut, strict=True):
        assert shard.find_positions(0, len(mine), len(mine), CPU).equal(mine)
        half = len(mine) // 2
        assert shard.find_positions(half, half, len(mine), CPU).equal(mine[half:]), "of a sequence-parallel rank"
    if cp_size > 1:
        parts = torch.cat(cut).chunk(2 * cp_size)
        assert torch.cat([parts[part] for part in order_parts(cp_size)]).equal(row[0])
        assert torch.cat([row[0].chunk(2 * cp_size)[part] for part in number_parts(cp_size)]).equal(torch.cat(cut))


@pytest.mark.parametrize("blocks", [None, ((20, 28),), ((7, 41), (48,))], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_spans_are_what_a_mask_would_say(blocks: tuple | None, window: int | None, cp_size: int) -> None:
    """Every pair of a query and a key that it sees, once; and no process computes much more than another."""
    num_rows = 2 if blocks is None else len(blocks)
    seen = torch.zeros(num_rows, S, S, dtype=torch.int64)
    for shard in list_shards(cp_size):
        here = shard.find_positions(0, S // cp_size, S // cp_size, CPU)
        for span in _list_spans(blocks, num_rows, S, shard, window):
            queries = here[span.queries]
            assert queries.tolist() == list(range(span.first_query, span.end))
            for keys, causal in span.list_calls():
                bias = span.build_bias(keys, torch.zeros(1, dtype=torch.float64))
                visible = torch.ones(len(queries), keys.stop - keys.start, dtype=torch.bool)
                visible = visible.tril() if causal else visible
                if bias is not None:
                    visible = visible & (bias[0, 0] == 0)
                seen[span.rows, queries[0] : queries[-1] + 1, keys] += visible
    distance = torch.arange(S)[:, None] - torch.arange(S)
    expected = (distance >= 0) & (distance < (window or S))
    for row, lengths in enumerate(blocks or ((S,),) * num_rows):
        numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
        assert seen[row].equal((expected & (numbers[:, None] == numbers)).long())


def test_whole_rows_cost_every_process_the_same() -> None:
    costs = set()
    for shard in list_shards(4):
        spans = _list_spans(None, 1, S, shard, None)
        costs.add(sum((s.end - s.first_query) * (k.stop - k.start) for s in spans for k, _ in s.list_calls()))
    assert len(costs) == 1


def test_the_dropout_mask_is_the_whole_rows() -> None:
    keys = compute_row_keys(torch.arange(2), seed=1, step=2)
    x_SBH = torch.ones(S, 2, 8)
    whole = DropoutMask(row_keys_B=keys, adapter_name="a", probability=0.5).apply(x_SBH)
    for shard in list_shards(4):
        num = S // 4
        part = DropoutMask(row_keys_B=keys, adapter_name="a", probability=0.5, row_shard=shard, num_positions=num)
        assert part.apply(x_SBH[:num]).equal(whole[shard.find_positions(0, num, num, CPU)])


MODEL = ModelConfig(
    name="toy", num_layers=1, hidden_size=16, num_heads=4, ffn_hidden_size=32, vocab_size=64, max_position_embeddings=64
)


DELTA = replace(
    MODEL,
    **{"family": "qwen3_5_text", "full_attention_layers": [], "delta_key_heads": 4, "delta_value_heads": 4},
    **{"delta_key_size": 4, "delta_value_size": 4, "delta_kernel_size": 4},
)


INDEXED = replace(
    MODEL,
    **{"family": "deepseek_v32", "num_heads": 4, "head_size": 8, "rope_head_size": 4, "value_head_size": 8},
    **{"query_latent_size": 8, "kv_latent_size": 8, "attended_positions": 32, "indexer_heads": 2},
    **{"indexer_head_size": 8, "num_experts": 2, "experts_per_token": 1, "rope_interleaved": True},
)


def build_data(seq_len: int) -> DataConfig:
    return DataConfig(name="fake", format="fake", seq_len=seq_len)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_attention": "mask"}, "use packed_attention=blocks or auto"),
        (
            {"model": DELTA, "topology": TopologyConfig(tp_size=2, cp_size=4)},
            "does not divide its 2 key heads",
        ),
        (
            {"model": INDEXED},
            "pick among whole ones in rows of data.seq_len=64",
        ),
        ({"cuda_graphs": True}, "cuda_graphs=true is not there for topology.cp_size>1"),
        (
            {"data": DataConfig(name="fake", format="fake", seq_len=62)},
            "parts of topology.cp_size=2: it is no multiple of 4",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(options: dict, message: str) -> None:
    usual = {"data": build_data(64), "topology": TopologyConfig(cp_size=2)}
    with pytest.raises(ValueError, match=message):
        build_run_config(options.pop("model", MODEL), LoraConfig(target_modules=["all"]), **(usual | options))


def test_row_lengths() -> None:
    for topology, multiple in (
        (TopologyConfig(), 1),
        (TopologyConfig(tp_size=4), 1),
        (TopologyConfig(tp_size=4, sequence_parallel=True), 4),
        (TopologyConfig(cp_size=3), 6),
        (TopologyConfig(tp_size=2, cp_size=4, sequence_parallel=True), 16),
    ):
        check_row_length(topology, 5 * multiple, 5 * multiple)
        if multiple > 1:
            with pytest.raises(ValueError, match=f"no multiple of {multiple}; set it to {6 * multiple}"):
                check_row_length(topology, 5 * multiple + 1, 6 * multiple)
            with pytest.raises(ValueError, match=f"set it to {5 * multiple}$"):
                check_row_length(topology, 5 * multiple + 1, 6 * multiple - 1)


@pytest.mark.parametrize(("method", "stage"), [("lora", 3), ("full", 1), ("full", 2), ("full", 3)])
def test_zero_partitions_over_parts_of_rows_as_over_replicas(method: str, stage: int) -> None:
    options = {"method": method, "zero": ZeroConfig(stage=stage), "data": build_data(64)}
    parts = build_run_config(MODEL, LoraConfig(rank=2), topology=TopologyConfig(cp_size=4, dp_size=1), **options)
    replicas = build_run_config(MODEL, LoraConfig(rank=2), topology=TopologyConfig(dp_size=4), **options)
    alone = build_run_config(MODEL, LoraConfig(rank=2), topology=TopologyConfig(dp_size=1), **options)
    assert compute_needed_bytes(parts, 0, 4) == compute_needed_bytes(replicas, 0, 4) < compute_needed_bytes(alone, 0, 1)
