"""Metrics of generated text with several references, in the units of the paper's tables.

As the E2E challenge computes them, https://github.com/tuetschek/e2e-metrics: BLEU and NIST on mteval-v13a's tokens,
lower-cased; METEOR, ROUGE-L and CIDEr are COCO's, on Penn Treebank tokens.
"""

from collections.abc import Sequence
from itertools import chain, islice

from lora_dist.tasks.java import compute_meteor, tokenize_as_treebank
from lora_dist.tasks.needs import find_java, import_extra
from lora_dist.tasks.nist import compute_nist

NO_JAVA = (
    "no java on PATH: METEOR is left out, and ROUGE-L and CIDEr are on mteval's tokens instead of the Penn Treebank's"
    " (off by up to 0.4 and 0.07 on ten E2E systems); install Java 8 or newer for the official ones"
)
NO_METEOR = "no java on PATH: METEOR is left out; install Java 8 or newer for it"
NIST_PERL = "NIST (mteval.pl)"
"""Of mteval-v13a.pl, beside the one of its Python form, which the LoRA authors ran."""

References = Sequence[Sequence[str]]
"""The references of each item, one at least."""


def score_challenge(outputs: Sequence[str], references: References) -> dict[str, float | None]:
    """The E2E challenge's scores by name; METEOR is None without Java."""
    nist = compute_nist(
        [tokenize_as_mteval(output) for output in outputs],
        [[tokenize_as_mteval(reference) for reference in item] for item in references],
    )
    bleu = compute_bleu(outputs, references)
    return {"BLEU": bleu, "NIST": nist.by_item, NIST_PERL: nist.by_corpus, **_score_as_coco(outputs, references)}


def compute_ter(outputs: Sequence[str], references: References) -> float:
    """Edits to the closest reference over its length (Tercom's translation edit rate), the mean over outputs."""
    ter = import_extra("sacrebleu.metrics").TER(case_sensitive=True)
    best = [
        min(ter.sentence_score(output, [reference]).score for reference in item)
        for output, item in zip(outputs, references, strict=True)
    ]
    return float(sum(best)) / len(best) / 100


def compute_bleu(outputs: Sequence[str], references: References) -> float:
    """Corpus BLEU of lower-cased mteval-v13a tokens, 0 to 100; brevity by the reference closest in length."""
    sacrebleu = import_extra("sacrebleu.metrics")
    most = max(map(len, references))
    streams = [[item[index] if index < len(item) else None for item in references] for index in range(most)]
    # `force` silences its warning about tokenised text, which the paper's scale is made of.
    score: float = sacrebleu.BLEU(lowercase=True, tokenize="13a", force=True).corpus_score(list(outputs), streams).score
    return score


def tokenize_as_mteval(text: str) -> list[str]:
    """Lower-cased tokens of mteval-v13a."""
    tokenizer = import_extra("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    tokens: str = tokenizer(text.lower())
    return tokens.split()


def _score_as_coco(outputs: Sequence[str], references: References) -> dict[str, float | None]:
    java = find_java()
    texts = list(chain(outputs, *references))
    tokenized = iter(map(_drop_punctuation, texts) if java is None else tokenize_as_treebank(java, texts))
    results = {index: [text] for index, text in enumerate(islice(tokenized, len(outputs)))}
    given = {index: list(islice(tokenized, len(item))) for index, item in enumerate(references)}
    rouge = import_extra("pycocoevalcap.rouge.rouge").Rouge().compute_score(given, results)[0]
    cider = import_extra("pycocoevalcap.cider.cider").Cider().compute_score(given, results)[0]
    meteor = None if java is None else compute_meteor(java, [one for (one,) in results.values()], list(given.values()))
    return {
        "METEOR": None if meteor is None else 100 * meteor,
        "ROUGE-L": 100 * float(rouge),
        "CIDEr": float(cider),
    }


def _drop_punctuation(text: str) -> str:
    dropped = import_extra("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS
    return " ".join(token for token in tokenize_as_mteval(text) if token not in dropped)
