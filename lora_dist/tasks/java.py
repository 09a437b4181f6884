"""The two Java programs behind the E2E scores, as packed in pycocoevalcap: the Penn Treebank tokenizer and METEOR 1.5.

Started here and not through pycocoevalcap's classes, which write into their own package, take the encoding of the
user's locale, and pair lines with texts without counting them.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lora_dist.tasks.needs import import_extra

_SEPARATOR = "|||"


def tokenize_as_treebank(java: str, texts: Sequence[str]) -> list[str]:
    """Each text lower-cased, its tokens one space apart, and without the punctuation that COCO's scorers leave out."""
    module = import_extra("pycocoevalcap.tokenizer.ptbtokenizer")
    dropped = frozenset(module.PUNCTUATIONS)
    jar = _find_jar(module.__file__, module.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    content = "".join(f"{_flatten(text)}\n" for text in texts).encode()
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(texts):
        raise _build_error(java, jar, done.stderr.decode(errors="replace"))
    return [" ".join(token for token in line.split() if token not in dropped) for line in lines]


def compute_meteor(java: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 for English of tokenised texts, from 0 to 1, an item's best reference counting."""
    module = import_extra("pycocoevalcap.meteor.meteor")
    jar = _find_jar(module.__file__, module.METEOR_JAR)
    command = [java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            statistics = []
            for output, item in zip(outputs, references, strict=True):
                texts = [*item, output]
                _send(process.stdin, ["SCORE", *(" ".join(text.replace(_SEPARATOR, " ").split()) for text in texts)])
                statistics.append(_receive(process.stdout))
            _send(process.stdin, ["EVAL", *statistics])
            return [float(_receive(process.stdout)) for _ in range(len(outputs) + 1)][-1]
    except BrokenPipeError:
        raise _build_error(java, jar, "it ended early") from None


def _send(stream: IO[str], fields: Sequence[str]) -> None:
    stream.write(f" {_SEPARATOR} ".join(fields) + "\n")
    stream.flush()


def _receive(stream: IO[str]) -> str:
    line = stream.readline().strip()
    if not line:
        raise BrokenPipeError
    return line


def _build_error(java: str, jar: str, output: str) -> ValueError:
    said = " ".join(output.split())[-300:]
    return ValueError(
        f"{java} cannot run {Path(jar).name} ({said}); it needs Java 8 or newer and 2 GB of memory; mend it,"
        " or take it off PATH to score without"
    )


def _flatten(text: str) -> str:
    """On one line, whatever ends a line for Java."""
    return " ".join(text.split())


def _find_jar(module_file: str | None, name: str) -> str:
    assert module_file is not None
    return str(Path(module_file).parent / name)
