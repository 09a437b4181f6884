"""Score E2E outputs with the E2E challenge's own scripts, for tests that hold lora_dist's scores against them.

    python tools/e2e_official_scores.py --checkout e2e-metrics --data DIR --output tests/golden/e2e_official_scores.json

`--checkout` is https://github.com/tuetschek/e2e-metrics with what its README asks for (Java, perl with XML::Twig); DIR
holds `e2e/official/testset_w_refs.csv`, `e2e/lora_format/test.txt` and `e2e_metrics/primary/*.tsv`, the challenge's
outputs (https://github.com/tuetschek/e2e-eval). `--small` scores those in tests/golden/e2e_small.json instead.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lora_dist.tasks.e2e_text import tokenize

SMALL = Path(__file__).parents[1] / "tests" / "golden" / "e2e_small.json"
Texts = list[str]


def score(official: Any, outputs: Texts, references: list[Texts]) -> dict[str, float]:
    """The five metrics by the scripts' Python half, and BLEU and NIST by their perl half."""
    perl = official.run_mteval(references, outputs, [""] * len(outputs))
    python = official.run_pymteval(references, outputs)
    coco = official.run_coco_eval(references, outputs).eval
    return {
        **{metric: float(python[metric]) for metric in ("BLEU", "NIST")},
        **{metric: float(coco[metric]) for metric in ("METEOR", "ROUGE_L", "CIDEr")},
        **{f"{metric}, perl": float(perl[metric]) for metric in ("BLEU", "NIST")},
    }


def read_groups(path: Path) -> list[Texts]:
    """The references of each context of a `context||reference` file."""
    groups: dict[str, Texts] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        context, reference = line.split("||")
        groups.setdefault(context, []).append(reference.strip())
    return list(groups.values())


def score_systems(official: Any, data: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By system: raw outputs against raw references, and both tokenised."""
    tokenized = read_groups(data / "e2e" / "lora_format" / "test.txt")
    scores = {}
    for path in sorted((data / "e2e_metrics" / "primary").glob("*.tsv")):
        references_file = str(data / "e2e" / "official" / "testset_w_refs.csv")
        _, references, outputs = official.load_data(references_file, str(path))
        scores[path.stem] = {
            "raw": score(official, outputs, references),
            "tokenised": score(official, [tokenize(output) for output in outputs], tokenized),
        }
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(given.checkout))
    official = importlib.import_module("measure_scores")
    if given.small:
        small = json.loads(SMALL.read_text(encoding="utf-8"))
        scores = {**small, "scores": score(official, small["outputs"], small["references"])}
    else:
        scores = score_systems(official, given.data)
    given.output.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
