"""Section 4.1 of the paper: with full rank everywhere and the biases trained, LoRA is as expressive as full tuning."""

import pytest
import torch
from processes import run_distributed
from toy import ALL_TARGETS, Case, build_batches, build_case

from lora_dist.config import LoraConfig
from lora_dist.lora.factors import derive_seed
from lora_dist.mcore.schedule import forward_backward

NUM_STEPS = 150
FULL = Case(method="full")
FULL_RANK = Case(lora=LoraConfig(rank=32, alpha=32, target_modules=ALL_TARGETS, bias="all"))
RANK_1 = Case(lora=LoraConfig(rank=1, alpha=1, target_modules=["q_proj"]))


def fit(case: Case, lr: float) -> float:
    """Loss on one fixed batch after training on it; LoRA starts from B = 0 and A of the weights' own size.

    Full tuning trains the same matrices and biases; the embedding, frozen in both, is one that tells tokens apart.
    """
    gpt, trainable, topology = build_case(case)
    gpt.embedding.word_embeddings.weight.data *= 30
    trainable = [one for one in trainable if "linear" in one.name or one.kind != "base"]
    for one in trainable:
        if one.kind == "lora_B":
            one.parameter.data.zero_()
        if one.kind == "lora_A":
            generator = torch.Generator().manual_seed(derive_seed(one.name))
            one.parameter.data.copy_(torch.randn(one.full_shape, generator=generator) / one.full_shape[1] ** 0.5)
    optimizer = torch.optim.Adam([one.parameter for one in trainable], lr=lr)
    batches = build_batches(topology)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss, _ = forward_backward(gpt, batches, seed=0, step=step, scale_loss=None)
        optimizer.step()
    return loss


@pytest.mark.slow
@pytest.mark.exhaustive
def test_full_rank_lora_reaches_full_fine_tunings_loss() -> None:
    full, lora, rank_1 = (run_distributed(fit, 1, case, 1e-2)[0] for case in (FULL, FULL_RANK, RANK_1))
    assert full < 0.1
    assert lora < 1.1 * full + 0.01
    assert rank_1 > 10 * lora
