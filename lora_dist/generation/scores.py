"""What logits go through before a token is chosen. Shapes: R rows, V vocabulary, L tokens so far, N = n-gram size."""

import torch

NO_TOKEN = -1
"""Stands in a history where a row is shorter than others; equals no token."""


def ban_repeats(scores_RV: torch.Tensor, history_RL: torch.Tensor, ngram_size: int) -> torch.Tensor:
    """-inf for every token that would complete an n-gram which the row's history holds already."""
    if ngram_size == 0 or history_RL.shape[1] < ngram_size:
        return scores_RV
    ngrams_RWN = history_RL.unfold(1, ngram_size, 1)
    begun_RN = history_RL[:, history_RL.shape[1] - ngram_size + 1 :]
    again_RW = (ngrams_RWN[..., :-1] == begun_RN[:, None]).all(-1)
    again_RW &= (ngrams_RWN >= 0).all(-1)  # an n-gram with padding or a trained vector (lora_dist.prefix) in it is none
    rows, ngrams = again_RW.nonzero(as_tuple=True)
    return scores_RV.index_put((rows, ngrams_RWN[rows, ngrams, -1]), scores_RV.new_tensor(float("-inf")))


def keep_top_k(logits_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    """-inf for all but the `top_k` largest logits (and those equal to the last of them); 0 keeps all."""
    if top_k == 0 or top_k >= logits_RV.shape[1]:
        return logits_RV
    smallest_R1 = logits_RV.topk(top_k).values[:, -1:]
    return logits_RV.masked_fill(logits_RV < smallest_R1, float("-inf"))


def keep_top_p(logits_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf for all but the fewest, most likely tokens whose probabilities add up to `top_p` or more; 1 keeps all.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).
    """
    if top_p == 1.0:
        return logits_RV
    probabilities_RV, order_RV = logits_RV.softmax(-1).sort(-1, descending=True)
    sum_before_RV = probabilities_RV.cumsum(-1) - probabilities_RV
    dropped_RV = torch.zeros_like(order_RV, dtype=torch.bool).scatter(1, order_RV, sum_before_RV >= top_p)
    return logits_RV.masked_fill(dropped_RV, float("-inf"))
