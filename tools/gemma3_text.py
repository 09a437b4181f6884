"""The text model out of a Gemma 3 checkpoint that sees pictures too (4B and larger), as a checkpoint of its own.

python tools/gemma3_text.py DIR OUT
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3ForConditionalGeneration


def write_text_model(source: Path, target: Path) -> None:
    """Weights in their own dtype, and the tokenizer where there is one. ValueError where `target` exists."""
    if target.exists():
        raise ValueError(f"{target} exists already; give a new directory")
    whole = Gemma3ForConditionalGeneration.from_pretrained(source, dtype="auto", local_files_only=True)
    text = Gemma3ForCausalLM(whole.config.text_config).to(whole.dtype)
    text.model.load_state_dict(whole.model.language_model.state_dict())
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
