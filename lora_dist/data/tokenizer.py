"""The base model's own tokenizer, from local files only, and how it begins a text."""

from pathlib import Path

from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast  # type: ignore[attr-defined]

from lora_dist.config import ModelConfig
from lora_dist.files.directories import read_json

_JSON_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TIKTOKEN, _CONVERTER = "tiktoken.model", "transformers.integrations.tiktoken.convert_tiktoken_to_fast"
_WORD_MARKER = "\u2581"
"""SentencePiece's sign for the space before a word; such a tokenizer begins every text with one."""


def load_model_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer in model.tokenizer or else in model.checkpoint, beside the weights; ValueError where unfit."""
    directory = model.tokenizer or model.checkpoint
    if directory is None:
        raise ValueError(
            "model.tokenizer is not set; give the directory of the tokenizer's files, or use data.format=fake"
        )
    return load_tokenizer(directory, model.vocab_size, family=model.family)


def load_tokenizer(directory: str, vocab_size: int, *, family: str = "gpt2") -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt; GPT-2's has exactly `vocab_size` tokens.

    Other families have embeddings with more rows than tokens. ValueError where files are missing or broken, where the
    sizes do not fit, or where no token ends a text.
    """
    _check_files(Path(directory))
    is_plain_gpt2 = family == "gpt2" or not (Path(directory) / "tokenizer.json").is_file()
    kind = GPT2TokenizerFast if is_plain_gpt2 else PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = kind.from_pretrained(directory, local_files_only=True)
    # Where transformers does not find a vocabulary it goes on with the end-of-text token alone.
    fits = len(tokenizer) == vocab_size if family == "gpt2" else 1 < len(tokenizer) <= vocab_size
    if not fits:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but model.vocab_size={vocab_size};"
            " set model.tokenizer to the directory of the model's own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} names no eos_token; add it to its tokenizer_config.json")
    return tokenizer


def find_start_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts in front of a text of its own accord: Llama's begin token, none for GPT-2 and Qwen."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: whole.index(plain[0])] if plain[0] in whole else []


def find_target_prefix(tokenizer: PreTrainedTokenizerFast) -> str:
    """The space that gives a target's first word its token of running text, unless the tokenizer puts it itself."""
    return "" if tokenizer.tokenize("a")[0].startswith(_WORD_MARKER) else " "


def _check_files(directory: Path) -> None:
    """transformers takes a missing directory for a name on its hub, and a missing vocabulary for an empty one."""
    names = ("tokenizer.json",) if (directory / "tokenizer.json").is_file() else ("vocab.json", "merges.txt")
    for name in names:
        path = directory / name
        if not path.is_file() and (directory / _TIKTOKEN).is_file():
            raise ValueError(
                f"{directory} has {_TIKTOKEN}, which code of its own reads, and a checkpoint's code is never run here;"
                f" set model.tokenizer to a directory with its vocabulary as tokenizer.json ({_CONVERTER} writes one)"
            )
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; model.tokenizer (or model.checkpoint) must be a directory with tokenizer.json,"
                " or vocab.json and merges.txt"
            )
    for name in _JSON_FILES:
        if (directory / name).is_file():
            read_json(directory / name)
    if names == ("tokenizer.json",) and "model" not in read_json(directory / names[0]):
        raise ValueError(f"{directory / names[0]} has no model, so it is no tokenizer's; copy it again")
