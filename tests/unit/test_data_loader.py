"""Global batches: the same at every dp_size, a function of the step alone, each example once in an epoch."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_files import build_config, tiny_tokenizer, write_pairs

from lora_dist.batch import Batch
from lora_dist.config import DataConfig, LoopConfig, RunConfig, TopologyConfig
from lora_dist.data.loader import build_loaders

NUM_PAIRS = 37
TENSORS = ("input_ids_BS", "labels_BS", "loss_mask_BS", "position_ids_BS", "row_ids_B")


@pytest.fixture(params=["pack", "pad"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> RunConfig:
    """37 examples in files; a global batch of 8 rows divides neither their number nor that of their packed rows."""
    data = DataConfig(
        name="pairs",
        format="e2e_text",
        train=str(write_pairs(tmp_path / "train.txt", NUM_PAIRS)),
        valid=str(write_pairs(tmp_path / "valid.txt", 19)),
        seq_len=64,
        collate=request.param,
    )
    return build_config(data, loop=LoopConfig(micro_batch_size=2, global_batch_size=8, seed=3))


def join(replicas: list[list[Batch]]) -> dict[str, list[object]]:
    """Rows of a global batch in order: microbatch by microbatch, replica by replica."""
    batches = [batch for passes in zip(*replicas, strict=True) for batch in passes]
    joined = {}
    for name in TENSORS:
        tensors = [getattr(batch, name) for batch in batches if getattr(batch, name) is not None]
        joined[name] = torch.cat(tensors).tolist() if tensors else []
    for name in ("num_loss_tokens", "num_tokens"):
        joined[name] = sorted({getattr(batch, name) for batch in batches})
    return joined


def get_targets(batches: list[Batch]) -> list[str]:
    """The learnt texts in order: each ends with the end token."""
    tokens = torch.cat([batch.labels_BS[batch.loss_mask_BS] for batch in batches])
    return tiny_tokenizer().decode(tokens).split("<|endoftext|>")[:-1]


def expected_targets(num_pairs: int) -> Counter[str]:
    return Counter(f" {'The Vaults ' * (number * 7 % 5)}is {number}" for number in range(num_pairs))


@pytest.mark.parametrize("dp_size", [2, 4])
def test_global_batch_does_not_depend_on_dp_size(config: RunConfig, dp_size: int) -> None:
    whole = build_loaders(config, dp_size=1, dp_rank=0)
    replicas = [build_loaders(config, dp_size=dp_size, dp_rank=dp_rank) for dp_rank in range(dp_size)]
    for step in (0, 3, 50):
        one = whole.train.batches_at(step)
        assert [batch.input_ids_BS.shape[0] for batch in one] == [2] * 4
        parts = [loaders.train.batches_at(step) for loaders in replicas]
        assert [len(part) for part in parts] == [4 // dp_size] * dp_size
        assert join(parts) == join([one])
    assert join([one])["row_ids_B"] == list(range(8))


def test_counts_are_those_of_the_global_batch(config: RunConfig) -> None:
    batches = build_loaders(config, dp_size=1, dp_rank=0).train.batches_at(2)
    assert batches[0].num_loss_tokens == sum(int(batch.loss_mask_BS.sum()) for batch in batches)
    # No token of these files is 0 where a text goes on, and the end token is the last of the vocabulary.
    assert batches[0].num_tokens == sum(int(batch.input_ids_BS.ne(0).sum()) for batch in batches)


def test_any_step_is_the_same_in_a_fresh_process(config: RunConfig) -> None:
    """Whatever was asked for before: resuming needs the step alone."""
    first = build_loaders(config, dp_size=1, dp_rank=0).train
    for step in range(7):
        first.batches_at(step)
    fresh = build_loaders(config, dp_size=1, dp_rank=0).train
    far = join([fresh.batches_at(10**6)])
    assert join([first.batches_at(7)]) == join([fresh.batches_at(7)])
    assert join([first.batches_at(10**6)]) == far


def test_each_epoch_has_every_example_once(config: RunConfig) -> None:
    """Epochs follow each other without a gap, though the batch size does not divide their rows."""
    loader = build_loaders(config, dp_size=1, dp_rank=0).train
    assert loader.num_rows % 8 != 0
    rows = [
        get_targets([dataclasses.replace(batch, loss_mask_BS=_only_row(batch.loss_mask_BS, row))])
        for step in range(-(-3 * loader.num_rows // 8))
        for batch in loader.batches_at(step)
        for row in range(2)
    ]
    epochs = [rows[epoch * loader.num_rows : (epoch + 1) * loader.num_rows] for epoch in range(3)]
    for epoch in epochs:
        assert Counter(target for row in epoch for target in row) == expected_targets(NUM_PAIRS)
    assert epochs[0] != epochs[1] != epochs[2]


def _only_row(loss_mask_BS: torch.Tensor, row: int) -> torch.Tensor:
    kept = torch.zeros_like(loss_mask_BS)
    kept[row] = loss_mask_BS[row]
    return kept


@pytest.mark.parametrize("dp_size", [1, 2])
def test_validation_is_the_whole_split_once(config: RunConfig, dp_size: int) -> None:
    """Over all replicas, in equal shapes, and every learnt token counted."""
    replicas = [build_loaders(config, dp_size=dp_size, dp_rank=dp_rank).valid for dp_rank in range(dp_size)]
    targets: list[str] = []
    for parts in zip(*(list(loader.validation_batches()) for loader in replicas if loader), strict=True):
        assert len({batch.input_ids_BS.shape for part in parts for batch in part}) == 1
        batches = [batch for passes in zip(*parts, strict=True) for batch in passes]
        assert {batch.num_loss_tokens for batch in batches} == {sum(int(b.loss_mask_BS.sum()) for b in batches)}
        targets += get_targets(batches)
    assert Counter(targets) == expected_targets(19)


def test_padded_rows_are_split_by_sequence_parallelism(config: RunConfig) -> None:
    config = dataclasses.replace(config, topology=TopologyConfig(tp_size=4, sequence_parallel=True))
    loaders = build_loaders(config, dp_size=1, dp_rank=0)
    assert loaders.valid is not None
    steps = [loaders.train.batches_at(step) for step in range(6)] + list(loaders.valid.validation_batches())
    for batches in steps:
        assert {batch.seq_len % 4 for batch in batches} == {0}
        assert len({batch.seq_len for batch in batches}) == 1
        if config.data.collate == "pack":
            assert batches[0].seq_len == 64


def test_report(config: RunConfig) -> None:
    with open(str(config.data.train), "a", encoding="utf-8") as file:
        file.write("no separator\n")
    config.data.on_bad_row = "skip"
    loaders = build_loaders(config, dp_size=1, dp_rank=0)
    report = json.loads(json.dumps(dataclasses.asdict(loaders.report)))
    assert (report["num_train_examples"], report["num_valid_examples"]) == (NUM_PAIRS, 19)
    assert report["skipped_rows"] == report["files"]["train"]["skipped_rows"] == {"no separator": 1}
    assert len(report["files"]["valid"]["sha256"]) == 64
    assert report["rows_per_epoch"] == loaders.train.num_rows
    assert report["loss_tokens_per_epoch"] < report["tokens_per_epoch"]
    if config.data.collate == "pack":
        positions = 64 * loaders.train.num_rows
        assert report["padding_fraction"] == pytest.approx(1 - report["tokens_per_epoch"] / positions)
    assert 0 < report["padding_fraction"] < 0.3


def test_first_examples_only(config: RunConfig) -> None:
    config.data.max_train_examples, config.data.max_valid_examples, config.data.valid = 5, 3, config.data.train
    loaders = build_loaders(config, dp_size=1, dp_rank=0)
    assert (loaders.report.num_train_examples, loaders.report.num_valid_examples) == (5, 3)
    assert loaders.valid is not None
    assert Counter(get_targets(next(loaders.valid.validation_batches()))) == expected_targets(3)


def test_no_validation_file(config: RunConfig) -> None:
    config.data.valid = None
    loaders = build_loaders(config, dp_size=1, dp_rank=0)
    assert loaders.valid is None
    assert loaders.report.num_valid_examples == 0


def test_batch_sizes_that_do_not_divide(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="global_batch_size 8 is not a multiple of micro_batch_size 2 x dp 3"):
        build_loaders(config, dp_size=3, dp_rank=0)


def test_fake_data() -> None:
    """Full rows without a tokenizer or a file; batches larger than an epoch go round."""
    data = DataConfig(name="fake", format="fake", seq_len=16, num_fake_examples=5)
    loaders = build_loaders(build_config(data, loop=LoopConfig(micro_batch_size=12)), dp_size=1, dp_rank=0)
    (batch,) = loaders.train.batches_at(1)
    assert batch.input_ids_BS.shape == (12, 16)
    assert batch.num_tokens == 12 * 16
    assert len(set(map(tuple, batch.input_ids_BS.tolist()))) == 5
    assert (loaders.report.num_train_examples, loaders.report.num_valid_examples) == (5, 1)
    assert (loaders.report.padding_fraction, loaders.report.files) == (0.0, {})
