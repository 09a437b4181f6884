"""Checkpoints of models that see pictures too: which hold a text model of a family, and what its tensors are called.

The text model is trained, as it is without pictures; the rest of such a checkpoint goes from it into what is written.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_dist.files.quantization import QUANTIZATION

WRAPPERS = {
    **{"gemma3": "gemma3_text", "mistral3": "mistral", "kimi_k25": "deepseek_v3"},
    **{"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_vl_moe": "qwen3_vl_moe_text"},
}
"""config.json's model_type -> that of its text_config where it has none."""
_AROUND_ONE = ("gemma3", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe")
"""Those around that text model alone."""
TEXT, TIED = "text_config", "tie_word_embeddings"
BESIDE = "beside "
"""In front of a stored name that is not the text model's, so that no name of both is the same."""
Layout = Mapping[str, str]
"""Beginning of a stored name of the text model alone -> of it in the whole model's files."""
_LAYOUTS: tuple[Layout, ...] = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)
"""As they are published, and as transformers has them in memory, and in some files since 4.52."""
_TEXT_ALONE = ("model.layers.", "model.embed_tokens.", "model.norm.")


def find_wrapper(config: Mapping[str, Any]) -> str | None:
    """config.json's model_type where that holds a text model; else None."""
    return next((wrapper for wrapper in WRAPPERS if wrapper == config.get("model_type")), None)


def get_text_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What config.json says of the text model: its text_config, with the dtype and the quantisation that stand outside
    it; all of it where it is a text model's. ValueError where there is none.
    """
    wrapper = find_wrapper(config)
    if wrapper is None:
        return dict(config)
    text = config.get(TEXT)
    if not isinstance(text, dict):
        raise ValueError(f"{path}: {TEXT}={text!r} of a {wrapper} is no JSON object; copy the file again")
    stored = text.get("model_type") or WRAPPERS[wrapper]
    if wrapper in _AROUND_ONE and stored != WRAPPERS[wrapper]:
        raise ValueError(
            f"{path}: model_type={wrapper!r} is not that of a model around a {stored!r}; copy the file again"
        )
    outer = {key: config[key] for key in ("dtype", "torch_dtype", QUANTIZATION) if config.get(key) is not None}
    inner = {key: value for key, value in text.items() if value is not None or key not in outer}
    return {"model_type": WRAPPERS[wrapper], **outer, **inner}


def list_tied(config: Mapping[str, Any]) -> set[bool]:
    """What the two levels of config.json say of the head; both values where they contradict each other.

    transformers 5 reads the outer one, true where it is not written, and does not tie a head that is stored and
    another; older ones read the inner one. So the files decide where the two differ.
    """
    return {bool(one[TIED]) for one in (config, config[TEXT]) if one.get(TIED) is not None}


def find_layout(names: Iterable[str], directory: Path) -> Layout:
    """How the files of a wrapper call the text model. ValueError where they do in no way that is known."""
    names = list(names)
    for layout in _LAYOUTS:
        if any(name.startswith(layout["model."]) for name in names):
            return layout
    known = " or ".join(layout["model."] for layout in _LAYOUTS)
    raise ValueError(f"{directory} holds no text model, whose tensors begin with {known}; copy the checkpoint again")


def to_text_name(name: str, layout: Layout) -> str | None:
    """A stored name as the text model alone has it; None where it is of another part."""
    for alone, stored in layout.items():
        if name.startswith(stored):
            return alone + name.removeprefix(stored)
    return None


def to_stored_name(text_name: str, layout: Layout) -> str:
    """The inverse of `to_text_name`."""
    for alone, stored in layout.items():
        if text_name.startswith(alone):
            return stored + text_name.removeprefix(alone)
    return text_name


def name_in_memory(text_name: str, wrapper: str | None) -> str:
    """What transformers 5 calls a module or a tensor of the text model inside a wrapper."""
    return text_name if wrapper is None else to_stored_name(text_name, _LAYOUTS[1])


def list_older_names(text_name: str, wrapper: str | None) -> list[str]:
    """What older ones call it."""
    return [] if wrapper is None else [to_stored_name(text_name, _LAYOUTS[0])]


def find_text_name(name: str, wrapper: str | None) -> str | None:
    """Of a module or tensor that a PEFT of any age names, of the whole model or of the text model alone; None where
    it is of another part.
    """
    if wrapper is None:
        return name
    found = (to_text_name(name, layout) for layout in _LAYOUTS)
    return next(filter(None, found), name if name.startswith(_TEXT_ALONE) else None)
