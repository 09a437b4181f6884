"""The most likely of given answers: every one of them is run after each context, and its tokens' log-likelihoods added.

Shapes: B contexts, K answers, R = B x K rows that run, T tokens of the longest answer, V vocabulary.
"""

from collections.abc import Sequence

import torch

from lora_dist.generation.batches import PromptBatch
from lora_dist.generation.decode import Choice
from lora_dist.generation.scores import NO_TOKEN


class GivenAnswers:
    """A search whose paths are fixed: it chooses among whole answers, not among tokens."""

    def __init__(self, batch: PromptBatch, answers: Sequence[Sequence[int]]) -> None:
        """Each of `answers` ends with its end token, so that one which begins another is no likelier for it."""
        self._answers = [list(answer) for answer in answers]
        device, longest = batch.tokens_BS.device, max(map(len, self._answers))
        padded = [[*answer, *[NO_TOKEN] * (longest - len(answer))] for answer in self._answers]
        self._token_KT = torch.tensor(padded, dtype=torch.int64, device=device)
        self._log_prob_BK = torch.zeros(batch.num_rows, len(padded), device=device)
        self._num_read = 0

    @property
    def num_rows(self) -> int:
        return self._log_prob_BK.numel()

    def choose(self, logits_RV: torch.Tensor) -> Choice:
        """One row a context at first, one an answer afterwards."""
        B, K = self._log_prob_BK.shape
        token_K = self._token_KT[:, self._num_read]
        next_K = token_K.clamp(min=0)
        log_prob_BKV = logits_RV.log_softmax(-1).view(B, -1, logits_RV.shape[1]).expand(B, K, -1)
        of_token_BK = log_prob_BKV.gather(2, next_K.expand(B, K)[:, :, None])[:, :, 0]
        self._log_prob_BK = self._log_prob_BK + of_token_BK.masked_fill(token_K == NO_TOKEN, 0.0)
        source_R = torch.arange(len(logits_RV), device=token_K.device).repeat_interleave(B * K // len(logits_RV))
        self._num_read += 1
        finished = self._num_read == self._token_KT.shape[1]
        return Choice(tokens_R=next_K.repeat(B), source_R=source_R, finished=finished)

    def results(self) -> list[list[int]]:
        """The best answer of each context, the first of equals, without its end token."""
        return [self._answers[best][:-1] for best in self._log_prob_BK.argmax(1).tolist()]
