"""The shipped E2E sample: whole, readable, small, attributed."""

from pathlib import Path

import pytest

import lora_dist
from lora_dist.data.readers import read_pairs
from lora_dist.data.rows import BadRows

SAMPLE = Path(lora_dist.__path__[0]) / "assets" / "e2e_sample"


@pytest.mark.parametrize(
    ("name", "num_pairs", "num_contexts"), [("train", 4000, 2645), ("valid", 400, 282), ("test", 477, 60)]
)
def test_counts(name: str, num_pairs: int, num_contexts: int) -> None:
    content = (SAMPLE / f"{name}.txt").read_bytes()
    pairs = list(read_pairs(content, "e2e_text", BadRows(name, "error")))
    assert (len(pairs), len({pair.context for pair in pairs})) == (num_pairs, num_contexts)
    assert all(pair.context.startswith("name : ") for pair in pairs)


def test_size_and_attribution() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 1_500_000
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert all(word in readme for word in ("CC BY-SA 4.0", "Novikova", "Rieser", "What was changed"))
