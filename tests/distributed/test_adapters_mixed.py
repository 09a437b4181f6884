"""Rows of one batch with different adapters, or none: each computes and learns what its adapter alone would."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_toy import VOCAB_SIZE, build_shard, count_processes, draw_adapter_values, read_toy_config, write_toy_checkpoint
from processes import run_distributed
from toy import gather_whole

from lora_dist.batch import Batch
from lora_dist.config import LoraConfig
from lora_dist.gradients import sum_tp_partial_gradients
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.mcore.hf_weights import load_hf_checkpoint
from lora_dist.mcore.live import LoadedAdapter, attach_adapters, describe_attached, load_shards
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.schedule import forward_backward
from lora_dist.measure.collectives import count_collectives

LORAS = [
    LoraConfig(rank=3, target_modules=["q_proj", "v_proj"]),
    LoraConfig(rank=1, alpha=4, target_modules=["all-linear"]),
    LoraConfig(rank=6, target_modules=["v_proj", "o_proj", "down_proj"], layers=[0, 3]),
]
ROWS = (0, 2, None, 1, 0, 2)
SEQ_LEN = 16
TOLERANCE = 1e-9
"""Relative, in fp64: a wrong sum, scale or row shows; rounding does not."""
TOPOLOGIES = [{}, {"tp_size": 2}, {"tp_size": 4}, {"tp_size": 2, "sequence_parallel": True}]


def open_toy(options: dict, base: Path, recompute: str = "none") -> tuple[ShardedGpt, list[LoadedAdapter]]:
    model = read_toy_config(base)
    gpt = build_shard(options, model, torch.float64)
    for layer in gpt.decoder.layers:
        layer.recompute = recompute
    load_hf_checkpoint(gpt, base)
    gpt.requires_grad_(False)
    return gpt, load_adapters(gpt, base)


def load_adapters(gpt: ShardedGpt, base: Path) -> list[LoadedAdapter]:
    model, adapters = read_toy_config(base), []
    for index, lora in enumerate(LORAS):
        specs = build_adapter_specs(lora, model)
        values = draw_adapter_values(specs, model, "none")
        adapters.append(load_shards(gpt, f"task{index}", specs, {k: v * (1 + index) for k, v in values.items()}))
        for shard in adapters[-1].shards.values():
            shard.double()
    return adapters


def build_batch(chosen: list[int], adapter_of_row: tuple[int | None, ...]) -> Batch:
    """Rows `chosen` of one fixed batch; the loss's denominator is always the whole batch's."""
    tokens = torch.randint(0, VOCAB_SIZE, (len(ROWS), SEQ_LEN + 1), generator=torch.Generator().manual_seed(7))
    rows = torch.tensor(chosen)
    return Batch(
        input_ids_BS=tokens[rows, :-1],
        labels_BS=tokens[rows, 1:],
        loss_mask_BS=torch.ones(len(chosen), SEQ_LEN, dtype=torch.bool),
        position_ids_BS=torch.arange(SEQ_LEN).expand(len(chosen), -1),
        row_blocks=None,
        row_ids_B=rows,
        num_loss_tokens=len(ROWS) * SEQ_LEN,
        num_tokens=len(ROWS) * SEQ_LEN,
        adapter_of_row=adapter_of_row,
    )


@torch.no_grad()
def compute_logits(gpt: ShardedGpt, batch: Batch) -> torch.Tensor:
    """[B, S, V] over TP."""
    gpt.eval()
    gpt.clock.adapter_of_row = batch.adapter_of_row
    local = gpt(batch.input_ids_BS, batch.position_ids_BS, None).contiguous()
    parts = [torch.empty_like(local) for _ in range(gpt.topology.tp_size)]
    dist.all_gather(parts, local, group=gpt.topology.tp_group)
    return torch.cat(parts, -1)[..., :VOCAB_SIZE]


def compute_gradients(gpt: ShardedGpt, adapters: list[LoadedAdapter], batch: Batch) -> dict[str, torch.Tensor]:
    """Whole gradients of every adapter's factors that got any."""
    trainable = [one for adapter in adapters for one in describe_attached(adapter)]
    for one in trainable:
        one.parameter.grad = None
    forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
    reached = [one for one in trainable if one.parameter.grad is not None]
    sum_tp_partial_gradients(reached, gpt.topology)
    return {one.name: gather_whole(one.parameter.grad, one, gpt.topology) for one in reached}


def compare_mixed_with_alone(options: dict, base: Path, recompute: str) -> dict[str, torch.Tensor]:
    gpt, adapters = open_toy(options, base, recompute)
    plain = compute_logits(gpt, build_batch(list(range(len(ROWS))), ()))
    attach_adapters(gpt, adapters)
    everything = build_batch(list(range(len(ROWS))), ROWS)
    mixed = compute_logits(gpt, everything)
    gradients = compute_gradients(gpt, adapters, everything)
    assert (mixed[2] - plain[2]).abs().max() < TOLERANCE * plain.abs().max()
    seen = 0
    for index, adapter in enumerate(adapters):
        rows = [row for row, chosen in enumerate(ROWS) if chosen == index]
        alone = build_batch(rows, (0,) * len(rows))
        attach_adapters(gpt, [adapter])
        expected = compute_logits(gpt, alone)
        assert (mixed[rows] - expected).abs().max() < TOLERANCE * expected.abs().max()
        assert (mixed[rows] - plain[rows]).abs().max() > 0.1 * plain.abs().max()
        for name, gradient in compute_gradients(gpt, [adapter], alone).items():
            assert gradient.abs().max() > 0
            assert (gradients[name] - gradient).abs().max() < TOLERANCE * gradient.abs().max(), name
            seen += 1
    assert seen == len(gradients) == 2 * sum(len(shard.specs) for a in adapters for shard in a.shards.values())
    return {"logits": mixed, **gradients}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_each_row_gets_what_its_adapter_alone_gives_at_every_tp(recompute: str, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    reference: dict[str, torch.Tensor] = {}
    for options in TOPOLOGIES if recompute == "none" else TOPOLOGIES[1:2]:
        for result in run_distributed(compare_mixed_with_alone, count_processes(options), options, tmp_path, recompute):
            reference = reference or result
            assert result.keys() == reference.keys()
            for name, tensor in result.items():
                limit = TOLERANCE * reference[name].abs().max()
                assert (tensor - reference[name]).abs().max() < limit, (options, name)


def count_mixed(options: dict, base: Path) -> tuple[object, object]:
    """Collectives of one step: with several adapters, and with one."""
    gpt, adapters = open_toy(options, base)
    counted = []
    for attached, rows in ((adapters, ROWS), (adapters[1:2], (0,) * len(ROWS))):
        attach_adapters(gpt, attached)
        for adapter in attached:
            describe_attached(adapter)
        with count_collectives(gpt.topology) as counter:
            forward_backward(gpt, [build_batch(list(range(len(ROWS))), rows)], seed=0, step=0, scale_loss=None)
        counted.append([(one.op, one.group, one.count) for one in counter.read()])
    return counted[0], counted[1]


def test_many_adapters_communicate_no_more_than_one(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    for many, one in run_distributed(count_mixed, 2, {"tp_size": 2}, tmp_path):
        assert many == one
        assert many


def train(gpt: ShardedGpt, adapters: list[LoadedAdapter], group: list[int]) -> dict[str, torch.Tensor]:
    """Three steps of the tasks in `group` on their own rows of one batch, each with its own learning rate."""
    rows = [row for row, task in enumerate(TASK_OF_ROW) if task in group]
    batch = build_batch(rows, tuple(group.index(TASK_OF_ROW[row]) for row in rows))
    attach_adapters(gpt, [adapters[task] for task in group])
    parts = [describe_attached(adapters[task]) for task in group]
    optimizer = torch.optim.AdamW(
        [
            {"params": [one.parameter for one in part], "lr": RATES[task]}
            for part, task in zip(parts, group, strict=True)
        ]
    )
    trainable = [one for part in parts for one in part]
    for _ in range(3):
        optimizer.zero_grad()
        forward_backward(gpt, [batch], seed=0, step=0, scale_loss=None)
        sum_tp_partial_gradients(trainable, gpt.topology)
        optimizer.step()
    return {one.name: gather_whole(one.parameter.detach(), one, gpt.topology) for one in trainable}


TASK_OF_ROW, RATES = (0, 1, 1, 0), (1e-2, 3e-3)


def train_together_and_alone(options: dict, base: Path) -> int:
    gpt, adapters = open_toy(options, base)
    together = train(gpt, adapters, [0, 1])
    alone = {**train(gpt, load_adapters(gpt, base), [0]), **train(gpt, load_adapters(gpt, base), [1])}
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert (value - alone[name]).abs().max() < 1e-7, name
    return len(together)


def test_tasks_trained_together_learn_what_each_learns_alone(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    assert run_distributed(train_together_and_alone, 2, {"tp_size": 2}, tmp_path) == [16 + 48] * 2


def refuse_biases(base: Path) -> str:
    gpt = build_shard({}, read_toy_config(base))
    load_hf_checkpoint(gpt, base)
    model = read_toy_config(base)
    specs = build_adapter_specs(LORAS[0], model)
    adapter = load_shards(gpt, "biased", specs, draw_adapter_values(specs, model, "all"))
    with pytest.raises(ValueError, match="biased has trained biases") as caught:
        attach_adapters(gpt, [adapter])
    return str(caught.value)


def test_trained_biases_cannot_be_mixed(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    (message,) = run_distributed(refuse_biases, 1, tmp_path)
    assert "merge it" in message
