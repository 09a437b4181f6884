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
    # E2E repeats each context some nine times.
    distinct = list(dict.fromkeys(pair.context for pair in pairs))
    contexts = dict(zip(distinct, tokenize_texts(distinct, tokenizer, "contexts"), strict=True))
    prefix, start, end = find_target_prefix(tokenizer), find_start_tokens(tokenizer), [int(tokenizer.eos_token_id)]
    targets = tokenize_texts([prefix + pair.target for pair in pairs], tokenizer, "targets")
    before_context, before_target = list_slots(slots)
    rows, num_asked = [], []
    for pair, target in zip(pairs, targets, strict=True):
        context = [*before_context, *start, *contexts[pair.context], *end, *before_target]
        num_positions = len(context) + len(target)
        if num_positions > seq_len:
            bad.add(pair.line, "too long", f"{num_positions} tokens, data.seq_len={seq_len}")
            continue
        rows.append([*context, *target, *end])
        num_asked.append(len(context))
    learnt = [np.arange(len(row)) >= asked for row, asked in zip(rows, num_asked, strict=True)]
    return replace(join_examples(rows, learnt), has_slots=slots is not None)


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


def tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, what: str) -> list[list[int]]:
    """Plain text only: `<|endoftext|>` spelt out in a file does not become the end token."""
    ids: list[list[int]] = []
    parts = [list(texts[first : first + _TEXTS_PER_CALL]) for first in range(0, len(texts), _TEXTS_PER_CALL)]
    for part in show_progress(parts, what, scale=_TEXTS_PER_CALL):
        encoded = tokenizer(
            part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids += encoded["input_ids"]
    return ids


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


def join_examples(rows: Sequence[Sequence[int]], learnt: Sequence[NDArray[np.bool_]]) -> Examples:
    """The examples whose tokens are `rows`; each has a truth value for each of its tokens in `learnt`."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(starts[-1]))
    return Examples(tokens=tokens, starts=starts, is_learnt=np.concatenate([np.zeros(0, dtype=np.bool_), *learnt]))
