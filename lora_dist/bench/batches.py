"""The random rows that every contender trains on: a pure function of the configuration and the step."""

import torch

from lora_dist.batch import Batch
from lora_dist.config import RunConfig, compute_num_microbatches
from lora_dist.lora.factors import derive_seed


def build_batches(config: RunConfig, step: int) -> list[Batch]:
    """The microbatches of one step. The loss is on the last `bench.target_fraction` of each row."""
    num_microbatches = compute_num_microbatches(config.loop, dp_size=1)
    rows_per_pass, seq_len = config.loop.micro_batch_size, config.data.seq_len
    num_rows = num_microbatches * rows_per_pass
    generator = torch.Generator().manual_seed(derive_seed(config.loop.seed, "bench", step))
    tokens = torch.randint(0, config.model.vocab_size, (num_rows, seq_len + 1), generator=generator)
    loss_mask = torch.zeros(num_rows, seq_len, dtype=torch.bool)
    loss_mask[:, seq_len - count_targets_per_row(config) :] = True
    batches = []
    for first in range(0, num_rows, rows_per_pass):
        rows = slice(first, first + rows_per_pass)
        batches.append(
            Batch(
                input_ids_BS=tokens[rows, :-1].contiguous(),
                labels_BS=(tokens[rows, 1:] * loss_mask[rows]).contiguous(),
                loss_mask_BS=loss_mask[rows],
                position_ids_BS=torch.arange(seq_len).expand(rows_per_pass, -1).contiguous(),
                row_blocks=None,
                row_ids_B=torch.arange(num_rows)[rows],
                num_loss_tokens=int(loss_mask.sum()),
                num_tokens=num_rows * seq_len,
            )
        )
    return batches


def count_targets_per_row(config: RunConfig) -> int:
    return max(1, round(config.bench.target_fraction * config.data.seq_len))
