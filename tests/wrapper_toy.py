"""Tiny checkpoints of models that see pictures, around family_toy's text models, from transformers' own classes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from family_models import SIZES
from family_toy import build_family_model, read_family_config
from hf_toy import draw_tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25VisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

from lora_dist.config import ModelConfig

IMAGE = 90
"""Token that stands for a part of a picture."""
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_KIMI_VISION = {**_VISION, "patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}

_QWEN: dict[str, Any] = {
    "vision_config": {
        **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
        **{"patch_size": 4, "temporal_patch_size": 1, "num_position_embeddings": 16},
    },
    **{"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
}


def _build_gemma3() -> PreTrainedModel:
    vision = SiglipVisionConfig(**_VISION, image_size=16, patch_size=8, vision_use_head=False)
    tokens = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 91, "eoi_token_index": 92}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=_text("gemma3_text"), vision_config=vision, **tokens)
    )


def _build_mistral3(text: str = "mistral") -> PreTrainedModel:
    options = {"image_token_index": IMAGE, "spatial_merge_size": 2, "tie_word_embeddings": False}
    vision = PixtralVisionConfig(**_VISION, head_dim=8, image_size=16, patch_size=4)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=_text(text), vision_config=vision, **options))


def _build_kimi_k25() -> PreTrainedModel:
    options = {"projection_hidden_size": 16, "image_token_id": IMAGE, "video_token_id": 91}
    vision = Kimi_K25VisionConfig(**_KIMI_VISION)
    return Kimi_K25ForConditionalGeneration(
        Kimi_K25Config(text_config=_text("deepseek_v3"), vision_config=vision, tie_word_embeddings=False, **options)
    )


def _build_qwen3_5() -> PreTrainedModel:
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=_text("qwen3_5_text"), **_QWEN))


def _build_qwen3_5_moe() -> PreTrainedModel:
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=_text("qwen3_5_moe_text"), **_QWEN))


def _build_qwen3_vl_moe() -> PreTrainedModel:
    sizes = {**SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**sizes, "rope_parameters": rope, "tie_word_embeddings": False}
    vision = {**_QWEN["vision_config"], "deepstack_visual_indexes": [0, 1]}
    options = {**_QWEN, "vision_config": vision, "tie_word_embeddings": False}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, **options))


def _text(family: str) -> Any:
    return build_family_model(family).config


_BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": _build_gemma3,
    "mistral3": _build_mistral3,
    "mistral3_ministral": partial(_build_mistral3, "ministral3"),
    "kimi_k25": _build_kimi_k25,
    "qwen3_5": _build_qwen3_5,
    "qwen3_5_moe": _build_qwen3_5_moe,
    "qwen3_vl_moe": _build_qwen3_vl_moe,
}
WRAPPERS = list(_BUILD)
NESTED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Published names -> those of some files since transformers 4.52."""
_MISNAMED = {"language_model.model.blocks.": "language_model.model.layers.", "model.mm_projector.": "mm_projector."}
"""What transformers 5.24 makes of a Kimi K2.5 that it did not read -> as that is published."""


@torch.no_grad()
def build_wrapper(name: str) -> PreTrainedModel:
    """Eval mode, every parameter drawn."""
    model, generator = _BUILD[name](), torch.Generator().manual_seed(5)
    if name in ("kimi_k25", "qwen3_5_moe", "qwen3_vl_moe"):
        model.set_experts_implementation("eager")  # the other ones have no fp64
    for parameter_name, parameter in model.named_parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        is_factor = "norm" in parameter_name and parameter_name.endswith("weight") and name != "gemma3"
        parameter.copy_(1 + drawn if is_factor else drawn)
    return model.eval()


def write_wrapper(
    name: str, directory: Path, *, nested: bool = False, dtype: torch.dtype = torch.float32
) -> ModelConfig:
    """As it is published, or with `nested` names; its configuration here."""
    build_wrapper(name).to(dtype).save_pretrained(directory)
    rename_tensors(directory, _MISNAMED)
    if name.startswith("qwen3_5"):  # what predicts a second token, and transformers does not read
        tensors = load_file(directory / "model.safetensors")
        extra = {"mtp.fc.weight": torch.ones(32, 64, dtype=dtype)}
        save_file(tensors | extra, directory / "model.safetensors", {"format": "pt"})
    if nested:
        rename_tensors(directory, NESTED)
    return read_family_config(directory)


def rename_tensors(directory: Path, beginnings: dict[str, str]) -> None:
    renamed = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        old = next((old for old in beginnings if name.startswith(old)), "")
        renamed[beginnings.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})


def edit_text_config(directory: Path, **changes: object) -> None:
    """Set keys of config.json's text_config; the value "gone" leaves one out."""
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"] | changes
    config["text_config"] = {key: value for key, value in text.items() if value != "gone"}
    (directory / "config.json").write_text(json.dumps(config))


def open_whole(directory: Path) -> PreTrainedModel:
    """As transformers reads it, finding every tensor and knowing each of them."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, found = AutoModelForImageTextToText.from_pretrained(directory, **options)
    assert not any(found.values()), found
    for parameter in model.parameters():  # in memory of its own: where a file's tensor begins rounds its product
        parameter.data = parameter.data.clone()
    return model.eval()


def draw_words() -> torch.Tensor:
    """[B, S] = [2, 16], without a token that stands for something else."""
    return draw_tokens() % IMAGE


def write_words(directory: Path) -> None:
    """A tokenizer as small as the text models are."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(101)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w100").save_pretrained(directory)


@torch.no_grad()
def look(model: PreTrainedModel, name: str) -> torch.Tensor:
    """[1, S, V] after a picture and some words."""
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(0, IMAGE, (5,), generator=generator)
    tokens_BS = torch.cat([words[:2], torch.full((4,), IMAGE), words[2:]])[None]
    picture = torch.randn(1, 3, 16, 16, generator=generator)
    seen: dict[str, Any] = {"pixel_values": picture}
    if name.startswith("mistral3"):
        seen["image_sizes"] = torch.tensor([[16, 16]])
    if name == "gemma3":
        seen["token_type_ids"] = (tokens_BS == IMAGE).long()
    if name == "kimi_k25":
        seen = {
            "pixel_values": torch.randn(16, 3, 2, 2, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    if name.startswith("qwen3"):
        seen = {
            "pixel_values": torch.randn(16, 3 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (tokens_BS == IMAGE).long(),
        }
    return model(input_ids=tokens_BS, **seen).logits
