"""One path a context: the most likely token each time, or one that is drawn. Shapes: B contexts, V vocabulary."""

from collections.abc import Sequence

import torch

from lora_dist.generation.batches import PromptBatch
from lora_dist.generation.decode import Choice
from lora_dist.generation.scores import NO_TOKEN, ban_repeats, keep_top_k, keep_top_p
from lora_dist.generation_config import GenerationConfig
from lora_dist.lora.factors import derive_seed


class OnePath:
    """Greedy where the temperature is 0. What is drawn depends on (seed, the context's number, step) alone."""

    def __init__(self, config: GenerationConfig, batch: PromptBatch, end_tokens: Sequence[int]) -> None:
        self._config, self._num_context = config, batch.tokens_BS.shape[1]
        self._history_BL = start_history(batch, in_context=config.ngrams_in_context)
        device = self._history_BL.device
        self._end_tokens = torch.tensor(list(end_tokens), dtype=torch.int64, device=device)
        self._source_B = torch.arange(batch.num_rows, device=device)
        self._ended_B = torch.zeros(batch.num_rows, dtype=torch.bool, device=device)
        self._generators = [torch.Generator().manual_seed(derive_seed(config.seed, "draw", i)) for i in batch.row_ids]

    @property
    def num_rows(self) -> int:
        return len(self._source_B)

    def choose(self, logits_BV: torch.Tensor) -> Choice:
        scores_BV = ban_repeats(logits_BV, self._history_BL, self._config.no_repeat_ngram_size)
        token_B = self._draw(scores_BV) if self._config.temperature > 0 else scores_BV.argmax(-1)
        self._ended_B |= torch.isin(token_B, self._end_tokens)
        kept_B = token_B.masked_fill(self._ended_B, NO_TOKEN)
        self._history_BL = torch.cat([self._history_BL, kept_B[:, None]], 1)
        num_new = self._history_BL.shape[1] - self._num_context
        finished = num_new == self._config.max_new_tokens or bool(self._ended_B.all())
        return Choice(tokens_R=token_B, source_R=self._source_B, finished=finished)

    def results(self) -> list[list[int]]:
        rows = self._history_BL[:, self._num_context :].tolist()
        return [[token for token in row if token != NO_TOKEN] for row in rows]

    def _draw(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """By inverting the distribution function, in fp64: a rounding of the logits changes a token very rarely."""
        config = self._config
        kept_BV = keep_top_p(keep_top_k(scores_BV / config.temperature, config.top_k), config.top_p)
        sums_BV = kept_BV.double().softmax(-1).cumsum(-1)
        drawn = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in self._generators])
        at_B = torch.searchsorted(sums_BV, drawn.to(sums_BV.device) * sums_BV[:, -1:], right=True)[:, 0]
        return at_B.clamp(max=scores_BV.shape[1] - 1)


def start_history(batch: PromptBatch, *, in_context: bool) -> torch.Tensor:
    """[B, S]; the contexts, NO_TOKEN in the padding, or everywhere where the context does not count."""
    column_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    hidden_BS = (column_S < batch.num_padding_B[:, None]) if in_context else torch.ones_like(batch.tokens_BS).bool()
    return batch.tokens_BS.masked_fill(hidden_BS, NO_TOKEN)
