"""Draw the E2E sample that is shipped, from the full text files.

    python tools/make_e2e_sample.py --source DIR --out lora_dist/assets/e2e_sample

DIR holds train.txt, valid.txt and test.txt with one `context||target` a line. Single pairs are drawn for training and
validation; for test, contexts with all their references, since a metric needs them together. Which ones depends on
the text alone. Rows keep the order of their file and lose the white space at their ends.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

NUM_TRAIN_PAIRS, NUM_VALID_PAIRS, NUM_TEST_CONTEXTS = 4000, 400, 60


def read_rows(path: Path) -> list[str]:
    """Every row as `context||target`, both stripped. ValueError at the first that has another form."""
    rows = []
    for line, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = [field.strip() for field in row.split("||")]
        if len(fields) != 2 or not all(fields):
            raise ValueError(f"{path}:{line}: not of the form context||target")
        rows.append("||".join(fields))
    return rows


def draw(items: Sequence[str], size: int) -> set[int]:
    """Places of `size` items, drawn by the hash of place and text: the same on every machine and Python."""
    if len(items) < size:
        raise ValueError(f"{size} rows are wanted, but there are only {len(items)}")
    hashes = [hashlib.sha256(f"{place} {item}".encode()).digest() for place, item in enumerate(items)]
    return set(sorted(range(len(items)), key=hashes.__getitem__)[:size])


def draw_pairs(rows: Sequence[str], size: int) -> list[str]:
    return [rows[place] for place in sorted(draw(rows, size))]


def draw_contexts(rows: Sequence[str], size: int) -> list[str]:
    """All rows of `size` contexts."""
    contexts = list(dict.fromkeys(row.split("||")[0] for row in rows))
    chosen = {contexts[place] for place in draw(contexts, size)}
    return [row for row in rows if row.split("||")[0] in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="directory of train.txt, valid.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    samples = {
        "train": draw_pairs(read_rows(args.source / "train.txt"), NUM_TRAIN_PAIRS),
        "valid": draw_pairs(read_rows(args.source / "valid.txt"), NUM_VALID_PAIRS),
        "test": draw_contexts(read_rows(args.source / "test.txt"), NUM_TEST_CONTEXTS),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        (args.out / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")
        print(f"{name}: {len(rows)} pairs of {len({row.split('||')[0] for row in rows})} contexts")


if __name__ == "__main__":
    main()
