"""Beam search with length penalty, several contexts at once; the rules are those of transformers' generate.

Shapes: B contexts, K beams, M candidates of a context, R = B x K rows that run, V vocabulary, T new tokens at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_dist.generation.batches import PromptBatch
from lora_dist.generation.decode import Choice
from lora_dist.generation.one_path import start_history
from lora_dist.generation.scores import NO_TOKEN, ban_repeats
from lora_dist.generation_config import GenerationConfig

_NEVER = -1.0e9
"""Added to a score that must not be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """The most likely continuations of each context's running hypotheses, best first."""

    log_prob_BM: torch.Tensor
    beam_BM: torch.Tensor
    """The hypothesis that each continues."""
    token_BM: torch.Tensor
    ends_BM: torch.Tensor
    """True where the hypothesis is whole: an end token, or no room for another."""


class BeamSearch:
    """Each context's best hypotheses, running and finished; the best finished one is its result."""

    def __init__(self, config: GenerationConfig, batch: PromptBatch, end_tokens: Sequence[int]) -> None:
        self._config = config
        B, K, device = batch.num_rows, config.num_beams, batch.tokens_BS.device
        self._end_tokens = torch.tensor(list(end_tokens), dtype=torch.int64, device=device)
        self._num_candidates = max(2, 1 + len(end_tokens)) * K
        self._context_BS = start_history(batch, in_context=config.ngrams_in_context)
        self._running_BKT = torch.zeros(B, 1, 0, dtype=torch.int64, device=device)
        self._log_prob_BK = torch.zeros(B, 1, device=device)  # one row a context until the first choice
        self._finished_BKT = torch.full((B, K, config.max_new_tokens), NO_TOKEN, device=device)
        self._score_BK = torch.full((B, K), _NEVER, device=device)
        self._is_finished_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
        self._can_improve_B = torch.ones(B, dtype=torch.bool, device=device)

    @property
    def num_rows(self) -> int:
        return len(self._context_BS) * self._config.num_beams

    @property
    def num_new(self) -> int:
        """Tokens of every running hypothesis."""
        return self._running_BKT.shape[2]

    def choose(self, logits_RV: torch.Tensor) -> Choice:
        candidates = self._find_candidates(logits_RV)
        self._keep_finished(candidates)
        beam_BK, token_BK = self._keep_running(candidates)
        self._update_can_improve()
        num_rows_before = logits_RV.shape[0] // len(self._context_BS)
        first_row_B = torch.arange(len(self._context_BS), device=beam_BK.device) * num_rows_before
        return Choice(
            tokens_R=token_BK.flatten(),
            source_R=(beam_BK + first_row_B[:, None]).flatten(),
            finished=self._has_finished(),
        )

    def results(self) -> list[list[int]]:
        best = self._finished_BKT[:, 0].tolist()
        ends = set(self._end_tokens.tolist())
        return [[token for token in row if token != NO_TOKEN and token not in ends] for row in best]

    def _find_candidates(self, logits_RV: torch.Tensor) -> Candidates:
        B, num_running, _ = self._running_BKT.shape
        context_BKS = self._context_BS[:, None].expand(-1, num_running, -1)
        history_RL = torch.cat([context_BKS, self._running_BKT], 2).flatten(0, 1)
        scores_RV = ban_repeats(logits_RV.log_softmax(-1), history_RL, self._config.no_repeat_ngram_size)
        vocab_size = scores_RV.shape[1]
        total_BKV = scores_RV.view(B, num_running, vocab_size) + self._log_prob_BK[:, :, None]
        log_prob_BM, index_BM = total_BKV.flatten(1).topk(self._num_candidates)
        token_BM = index_BM % vocab_size
        ends_BM = torch.isin(token_BM, self._end_tokens)
        if self.num_new + 1 == self._config.max_new_tokens:
            ends_BM = torch.ones_like(ends_BM)
        return Candidates(log_prob_BM=log_prob_BM, beam_BM=index_BM // vocab_size, token_BM=token_BM, ends_BM=ends_BM)

    def _keep_finished(self, found: Candidates) -> None:
        """Of the finished hypotheses so far and those of the K best candidates that end, the K best."""
        K, length = self._config.num_beams, self.num_new + 1
        score_BM = found.log_prob_BM / length**self._config.length_penalty
        counts_BM = found.ends_BM & self._can_improve_B[:, None]
        counts_BM[:, K:] = False
        if self._config.early_stopping == "when_full":
            counts_BM &= ~self._is_finished_BK.all(1, keepdim=True)
        score_BM = score_BM + _NEVER * ~counts_BM
        sequence_BMT = torch.full_like(self._finished_BKT[:, :1], NO_TOKEN).repeat(1, score_BM.shape[1], 1)
        sequence_BMT[:, :, : length - 1] = _gather(self._running_BKT, found.beam_BM)
        sequence_BMT[:, :, length - 1] = found.token_BM
        self._score_BK, best_BK = torch.cat([self._score_BK, score_BM], 1).topk(K)
        self._is_finished_BK = torch.cat([self._is_finished_BK, counts_BM], 1).gather(1, best_BK)
        self._finished_BKT = _gather(torch.cat([self._finished_BKT, sequence_BMT], 1), best_BK)

    def _keep_running(self, found: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best candidates that do not end go on; the hypothesis that each continues, and its token."""
        self._log_prob_BK, best_BK = (found.log_prob_BM + _NEVER * found.ends_BM).topk(self._config.num_beams)
        beam_BK, token_BK = found.beam_BM.gather(1, best_BK), found.token_BM.gather(1, best_BK)
        self._running_BKT = torch.cat([_gather(self._running_BKT, beam_BK), token_BK[:, :, None]], 2)
        return beam_BK, token_BK

    def _update_can_improve(self) -> None:
        """A context that cannot improve once never can again, even where its penalty rewards length."""
        config, length = self._config, self.num_new
        if config.early_stopping == "exhaustive" and config.length_penalty > 0:
            length = config.max_new_tokens
        best_running_B = self._log_prob_BK[:, 0] / length**config.length_penalty
        worst_B = self._score_BK.amin(1).masked_fill(~self._is_finished_BK.all(1), _NEVER)
        self._can_improve_B &= best_running_B > worst_B

    def _has_finished(self) -> bool:
        full = self._config.early_stopping == "when_full" and bool(self._is_finished_BK.all())
        return full or self.num_new == self._config.max_new_tokens or not bool(self._can_improve_B.any())


def _gather(tensor_BKT: torch.Tensor, index_BN: torch.Tensor) -> torch.Tensor:
    """[B, N, T]: hypotheses `index_BN` of each context."""
    return tensor_BKT.gather(1, index_BN[:, :, None].expand(-1, -1, tensor_BKT.shape[2]))
