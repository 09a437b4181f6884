"""The two ways E2E texts are written: as published ("raw"), and with words and punctuation spaced out ("tokenised").

The LoRA authors' files are the tokenised form, so their scores are of tokenised outputs against tokenised references.
`tokenize` turns 4,692 of the published test set's 4,693 references into theirs, letter by letter.
"""

import re
from collections.abc import Sequence

_CLITIC = r"n't|'(?:s|re|ll|ve|d|m|t)"
_PUNCTUATION = re.compile(r'([,;:?!"()])')
_OPENING_SIGN = re.compile(rf"(?<!\S)(?!(?:{_CLITIC})(?!\S))(['$£])(?=\w)", re.IGNORECASE)
_CLOSING_DOTS = re.compile(r"(?<![.\s])(\.+)(?=\s|$)")
_HYPHEN = re.compile(r"(?<=[^\W\d])-(?=[^\W\d])|(?<=\d)-(?=\d)")
_JOINED_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ll|ve|d|m))(?!\w)", re.IGNORECASE)
_CLOSING_QUOTE = re.compile(r"(?<=\w)'(?=\s|$)")
_SPACED_END = re.compile(rf"(?<!^) ([,;:?!.]|{_CLITIC})(?!\S)", re.IGNORECASE)
_SPACED_SIGN = re.compile(r"(?<!\S)([$£]) (?=\d)")
_SPACED_HYPHEN = re.compile(r"(?<=[^\W\d]) - (?=[^\W\d])|(?<=\d) - (?=\d)")


def tokenize(text: str) -> str:
    """`It's family-friendly, £20-25.` -> `It 's family - friendly , £ 20 - 25 .`; tokenised text stays as it is."""
    text = _PUNCTUATION.sub(r" \1 ", text)
    text = _OPENING_SIGN.sub(r"\1 ", text)
    text = _CLOSING_DOTS.sub(r" \1 ", text)
    text = _HYPHEN.sub(" - ", text)
    text = _JOINED_CLITIC.sub(r" \1", text)
    text = _CLOSING_QUOTE.sub(" ' ", text)
    return " ".join(text.split())


def detokenize(text: str) -> str:
    """The way back. Spaces that stood around a dash or a quote in the published text cannot be told from added ones."""
    text = _SPACED_END.sub(r"\1", text)
    text = _SPACED_SIGN.sub(r"\1", text)
    return _SPACED_HYPHEN.sub("-", text)


def are_tokenized(texts: Sequence[str]) -> bool:
    """Whether most texts are what `tokenize` makes of them; published sentences, which end in a dot, are not."""
    return sum(tokenize(text) == text.strip() for text in texts) * 2 > len(texts)
