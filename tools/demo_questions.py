"""Turn three openly licensed question sets into plain text for tools/make_demo_base.py.

    python tools/demo_questions.py --banking77 DIR --clinc150 DIR --wikisql wikisql.json.bz2 --out CORPUS_DIR

banking77 and clinc150 give one question a line; WikiSQL gives the columns and values a question asks about, then the
question, so that the base meets sentences written from fields before it meets E2E.
"""

import argparse
import bz2
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path


def read_banking77(directory: Path) -> Iterator[str]:
    with (directory / "train.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield " ".join(row["text"].split())


def read_clinc150(directory: Path) -> Iterator[str]:
    splits = json.loads((directory / "data_full.json").read_text(encoding="utf-8"))
    for text, _intent in splits["train"]:
        yield text


def read_wikisql(path: Path) -> Iterator[str]:
    """Every training question of the text2sql-data form, behind the fields of its query."""
    entries = json.loads(bz2.decompress(path.read_bytes()))
    for entry in entries:
        fields = describe_query(entry["sql"][0])
        for sentence in entry["sentences"]:
            if sentence["question-split"] == "train":
                yield f"{fill_variables(fields, sentence['variables'])}\n{sentence['original'].strip()}"


def describe_query(query: str) -> str:
    """`SELECT T.NOTES_FIELD ... WHERE T.SLOGAN_FIELD = "var0"` -> `notes ; slogan = var0`."""
    selected, _, conditions = query.partition(" FROM TABLE AS TABLEalias0")
    kept = " ; ".join(part for part in (selected.removeprefix("SELECT"), conditions) if part.strip(" ;"))
    kept = re.sub(r"TABLEalias\d+\.|_FIELD|\bWHERE\b|\"", "", kept).strip(" ;")
    kept = kept.replace(" AND ", " ; ").replace("_", " ")
    return " ".join(kept.split()).lower()


def fill_variables(fields: str, variables: dict[str, str]) -> str:
    return re.sub(r"\bvar\d+\b", lambda match: variables.get(match.group(), match.group()), fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking77", type=Path, required=True, help="directory that holds train.csv")
    parser.add_argument("--clinc150", type=Path, required=True, help="directory that holds data_full.json")
    parser.add_argument("--wikisql", type=Path, required=True, help="wikisql.json.bz2 of text2sql-data")
    parser.add_argument("--out", type=Path, required=True, help="directory for the three .txt files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sources = {
        "banking77": read_banking77(args.banking77),
        "clinc150": read_clinc150(args.clinc150),
        "wikisql": read_wikisql(args.wikisql),
    }
    for name, lines in sources.items():
        (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
