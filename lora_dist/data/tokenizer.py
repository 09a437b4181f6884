"""GPT-2's byte-level BPE, from local files only."""

import json
from pathlib import Path

from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast  # type: ignore[attr-defined]

from lora_dist.config import ModelConfig


def load_model_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer in model.tokenizer or else in model.checkpoint, beside the weights; ValueError where unfit."""
    directory = model.tokenizer or model.checkpoint
    if directory is None:
        raise ValueError(
            "model.tokenizer is not set; give the directory of the tokenizer's files, or use data.format=fake"
        )
    return load_tokenizer(directory, model.vocab_size)


def load_tokenizer(directory: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens from tokenizer.json, or from vocab.json and merges.txt.

    ValueError where files are missing or broken, where the sizes differ, or where no token ends a text.
    """
    _check_files(Path(directory))
    tokenizer: PreTrainedTokenizerFast = GPT2TokenizerFast.from_pretrained(directory, local_files_only=True)
    # Where transformers does not find a vocabulary it goes on with the end-of-text token alone.
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but model.vocab_size={vocab_size};"
            " set model.tokenizer to the directory of the model's own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} names no eos_token; add it to its tokenizer_config.json")
    return tokenizer


def _check_files(directory: Path) -> None:
    """transformers takes a missing directory for a name on its hub, and a missing vocabulary for an empty one."""
    names = ("tokenizer.json",) if (directory / "tokenizer.json").is_file() else ("vocab.json", "merges.txt")
    for name in names:
        path = directory / name
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; model.tokenizer (or model.checkpoint) must be a directory with tokenizer.json,"
                " or vocab.json and merges.txt"
            )
        if path.suffix == ".json":
            _check_json(path)


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON ({error}); copy it again") from None
