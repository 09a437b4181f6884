"""Examples as tokens: encoded from pairs of text, or drawn at random.

An example is `context <|endoftext|> target <|endoftext|>`, as in the LoRA authors' GPT-2 experiments: the first end
token asks for the target, the second is learnt with it. The context starts the row without a space, behind the begin
token where the tokenizer has one; the target gets one space before it, so that its first word has the token it has in
running text. A method's slots (lora_dist.prefix) stand before all that and between the first end token and the target.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lora_dist.data.rows import BadRows, Pair
from lora_dist.data.tokenizer import find_start_tokens, find_target_prefix
from lora_dist.lora.factors import derive_seed
from lora_dist.prefix.slots import list_slots
from lora_dist.prefix_config import PrefixConfig

_TEXTS_PER_CALL = 2000
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examples:
    """N examples, end to end in one array."""

    tokens: NDArray[np.int32]
    """Negative at slots."""
    starts: NDArray[np.int64]
    """[N + 1]; example i is tokens[starts[i] : starts[i + 1]]."""
    is_learnt: NDArray[np.bool_]
    """As tokens: which of them the model learns to predict from those before; never an example's first."""
    has_slots: bool = False

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_positions(self) -> NDArray[np.int64]:
        """[N]; positions an example takes up in a row: all its tokens but the last, which is only predicted."""
        positions: NDArray[np.int64] = np.diff(self.starts) - 1
        return positions

    def hash(self) -> str:
        """Of all tokens, of which are learnt, and of where examples begin."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.is_learnt, self.starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def num_loss_tokens(self) -> NDArray[np.int64]:
        """[N]; tokens that are learnt, of a pair the target's and its end."""
        return np.add.reduceat(self.is_learnt, self.starts[:-1], dtype=np.int64)


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seq_len: int,
    bad: BadRows,
    slots: PrefixConfig | None = None,
) -> Examples:
    """Tokens of the pairs that fit into `seq_len` positions with their slots; the others go to `bad`."""
    start, end = find_start_tokens(tokenizer), [int(tokenizer.eos_token_id)]
    before_context, before_target = list_slots(slots)
    # E2E repeats each context some nine times.
    distinct = list(dict.fromkeys(pair.context for pair in pairs))
    tokenized = zip(distinct, tokenize_texts(distinct, tokenizer, "contexts"), strict=True)
    asked = {text: _as_row([*before_context, *start, *one, *end, *before_target]) for text, one in tokenized}
    prefix = find_target_prefix(tokenizer)
    targets = tokenize_texts([prefix + pair.target for pair in pairs], tokenizer, "targets")
    rows, learnt = [], []
    for pair, target in zip(pairs, targets, strict=True):
        question = asked[pair.context]
        num_positions = len(question) + len(target)
        if num_positions > seq_len:
            bad.add(pair.line, "too long", f"{num_positions} tokens, data.seq_len={seq_len}")
            continue
        rows.append(np.concatenate([question, _as_row([*target, *end])]))
        learnt.append(np.arange(num_positions + 1) >= len(question))
    return replace(join_examples(rows, learnt), has_slots=slots is not None)


def _as_row(tokens: Sequence[int]) -> NDArray[np.int32]:
    """An array at once: as Python's numbers a file's tokens would take ten times the memory."""
    return np.array(tokens, dtype=np.int32)


def draw_fake_examples(
    num_examples: int, *, vocab_size: int, seq_len: int, seed: int, slots: PrefixConfig | None = None
) -> Examples:
    """Random tokens; each example fills a row of `seq_len` positions, half of those that are no slots context."""
    before_context, before_target = list_slots(slots)
    num_slots = len(before_context) + len(before_target)
    num_asked = num_slots + (seq_len - num_slots - 1) // 2 + 1
    generator = np.random.default_rng(derive_seed(seed, "fake"))
    tokens = generator.integers(0, vocab_size, (num_examples, seq_len + 1), dtype=np.int32)
    tokens[:, : len(before_context)] = before_context
    tokens[:, num_asked - len(before_target) : num_asked] = before_target
    return Examples(
        tokens=tokens.reshape(-1),
        starts=np.arange(num_examples + 1, dtype=np.int64) * (seq_len + 1),
        is_learnt=np.tile(np.arange(seq_len + 1) >= num_asked, num_examples),
        has_slots=slots is not None,
    )


def tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, what: str) -> Iterator[list[int]]:
    """Plain text only: `<|endoftext|>` spelt out in a file does not become the end token."""
    parts = [list(texts[first : first + _TEXTS_PER_CALL]) for first in range(0, len(texts), _TEXTS_PER_CALL)]
    for part in show_progress(parts, what, scale=_TEXTS_PER_CALL):
        encoded = tokenizer(
            part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        yield from encoded["input_ids"]


def show_progress(items: Sequence[_Item], what: str, *, scale: int = 1) -> Iterator[_Item]:
    """The items, under a bar on the first process once it takes two seconds; each stands for `scale` of them."""
    silent = dist.is_initialized() and dist.get_rank() != 0
    with tqdm(total=len(items) * scale, desc=f"tokenizing {what}", delay=2.0, disable=silent) as bar:
        for item in items:
            yield item
            bar.update(scale)


def concatenate_examples(parts: Sequence[Examples]) -> Examples:
    """One behind the other; there is at least one part."""
    begins = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = [part.starts[:-1] + begin for part, begin in zip(parts, begins, strict=False)]
    return Examples(
        tokens=np.concatenate([part.tokens for part in parts]),
        starts=np.concatenate([*starts, begins[-1:]]),
        is_learnt=np.concatenate([part.is_learnt for part in parts]),
        has_slots=parts[0].has_slots,
    )


def join_examples(rows: Sequence[NDArray[np.int32]], learnt: Sequence[NDArray[np.bool_]]) -> Examples:
    """The examples whose tokens are `rows`; each has a truth value for each of its tokens in `learnt`."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return Examples(
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *rows]),
        starts=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        is_learnt=np.concatenate([np.zeros(0, dtype=np.bool_), *learnt]),
    )
