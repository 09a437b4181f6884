"""The text model out of a Qwen3.5 checkpoint, which sees pictures too, as a checkpoint of its own.

python tools/qwen3_5_text.py DIR OUT
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_text_model(source: Path, target: Path) -> None:
    """Weights in their own dtype, and the tokenizer where there is one. ValueError where `target` exists."""
    if target.exists():
        raise ValueError(f"{target} exists already; give a new directory")
    read = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    with torch.device("meta"):
        text = type(read)(read.config)  # one that was read would be saved under the names of the whole model
    text.load_state_dict(read.state_dict(), assign=True)
    text.save_pretrained(target)
    if (source / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of the whole checkpoint")
    parser.add_argument("target", type=Path, help="new directory")
    arguments = parser.parse_args()
    write_text_model(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
