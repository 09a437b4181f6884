"""What stands beside a model's weights for its texts, copied from one directory to another: tokenizer, templates."""

import shutil
from pathlib import Path

CHAT_TEMPLATE = "chat_template.jinja"
OLD_CHAT_TEMPLATE = "chat_template.json"
"""Of a processor of texts and pictures."""
_OTHER_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tiktoken.model", "tekken.json", "spm.model", "spiece.model"),
    *("vocab.json", "merges.txt", "vocab.txt", CHAT_TEMPLATE),
)
_PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    OLD_CHAT_TEMPLATE,
)
_GENERATION_CONFIG = "generation_config.json"


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Those of its files that are there, under the names that transformers, vLLM and mistral-common read."""
    for name in _TOKENIZER_FILES:
        _copy(source / name, directory / name)
    for template in sorted((source / _OTHER_TEMPLATES).glob("*.jinja")):
        (directory / _OTHER_TEMPLATES).mkdir(exist_ok=True)
        _copy(template, directory / _OTHER_TEMPLATES / template.name)


def copy_generation_config(checkpoint: Path, directory: Path) -> None:
    """How the model is decoded by default, and what ends its answers, where the checkpoint says so."""
    _copy(checkpoint / _GENERATION_CONFIG, directory / _GENERATION_CONFIG)


def copy_processors(checkpoint: Path, directory: Path) -> None:
    """What prepares pictures for a model that sees them."""
    for name in _PROCESSOR_FILES:
        _copy(checkpoint / name, directory / name)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)
