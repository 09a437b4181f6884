"""The encoder with its head, from a local Hugging Face directory, and the names of its parts by family."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from lora_dist.classify_config import EncoderConfig
from lora_dist.config import ModelConfig
from lora_dist.files.directories import read_json
from lora_dist.lora.factors import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Where a family of transformers' models keeps what is adapted and what always trains."""

    layers: str
    """Prefix of a layer's modules, with {layer}."""
    targets: Mapping[str, str]
    """Target -> its linear within a layer; q, k and v share one where the projection is fused."""
    head: tuple[str, ...]
    """Modules that a checkpoint of the base lacks and every task trains."""
    dropout: str
    """Key of config.json for the head's dropout."""

    def name_linear(self, layer: int, target: str) -> str:
        return self.layers.format(layer=layer) + self.targets[target]


_REST = {"o_proj": "attention.output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense"}
FAMILIES = {
    "roberta": Family(
        layers="roberta.encoder.layer.{layer}.",
        targets={f"{one[0]}_proj": f"attention.self.{one}" for one in ("query", "key", "value")} | _REST,
        head=("classifier",),
        dropout="classifier_dropout",
    ),
    "deberta": Family(
        layers="deberta.encoder.layer.{layer}.",
        targets=dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention.self.in_proj") | _REST,
        head=("pooler", "classifier"),
        dropout="cls_dropout",
    ),
    "deberta-v2": Family(
        layers="deberta.encoder.layer.{layer}.",
        targets={f"{one[0]}_proj": f"attention.self.{one}_proj" for one in ("query", "key", "value")} | _REST,
        head=("pooler", "classifier"),
        dropout="cls_dropout",
    ),
}
"""By config.json's model_type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A model with its family, and its sizes in the words of this project."""

    model: nn.Module
    family: Family
    shape: ModelConfig
    head_labels: tuple[str, ...] | None = None
    """What the outputs of the checkpoint's own head mean; None where it has none."""

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head."""
        return name.split(".")[0] in self.family.head


def read_family(config: EncoderConfig) -> tuple[str, dict[str, Any]]:
    """model_type and config.json. ValueError where it is none of FAMILIES."""
    path = Path(config.checkpoint) / "config.json"
    if not path.is_file():
        raise ValueError(f"encoder.checkpoint={config.checkpoint} has no config.json; give a Hugging Face directory")
    content = read_json(path)
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r} is none of {', '.join(FAMILIES)}; decoders train with `train`")
    return str(kind), content


def open_encoder(config: EncoderConfig, *, num_labels: int, dtype: torch.dtype, seed: int) -> Encoder:
    """Frozen; the head, which a checkpoint of the base lacks, is drawn from `seed` and fp32.

    ValueError where the checkpoint is not safetensors, or lacks anything but the head.
    """
    kind, content = read_family(config)
    family = FAMILIES[kind]
    _check_seq_len(config, kind, content)
    settings = AutoConfig.from_pretrained(config.checkpoint, num_labels=num_labels, local_files_only=True)
    if config.classifier_dropout is not None:
        setattr(settings, family.dropout, config.classifier_dropout)
    torch.manual_seed(derive_seed(seed, "head"))
    logging.set_verbosity_error()  # it tells at length that the head is missing; what else is, is an error below
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.checkpoint,
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ValueError(f"encoder.checkpoint={config.checkpoint}: {str(error).splitlines()[0]}") from None
    has_head = _check_loaded(config, family, info)
    model.to(dtype).requires_grad_(False)  # transformers leaves DeBERTa's biases of q and v in fp32
    for name in family.head:
        model.get_submodule(name).float().register_forward_pre_hook(_to_fp32)
    labels = _read_labels(content) if has_head else None
    return Encoder(model=model, family=family, shape=_describe_shape(config, content), head_labels=labels)


def _check_seq_len(config: EncoderConfig, kind: str, content: Mapping[str, Any]) -> None:
    """ValueError for more positions than the checkpoint's table has, where it has one. RoBERTa's begins behind padding.

    DeBERTa's positions are relative, and where it adds none to the embedding any length will do.
    """
    if kind != "roberta" and not content.get("position_biased_input", True):
        return
    behind = 1 + (content.get("pad_token_id", 1) or 0) if kind == "roberta" else 0
    most = content["max_position_embeddings"] - behind
    if config.seq_len > most:
        raise ValueError(f"encoder.seq_len={config.seq_len} exceeds the {most} positions of {config.checkpoint}")


def _read_labels(content: Mapping[str, Any]) -> tuple[str, ...]:
    """By their numbers: transformers writes them sorted as text, "10" before "2"."""
    names = content.get("id2label", {})
    return tuple(names[number] for number in sorted(names, key=int))


def _to_fp32(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float() for tensor in inputs)


def _check_loaded(config: EncoderConfig, family: Family, info: Mapping[str, Any]) -> bool:
    """Only the head may be missing, or of another task's size; whether it is there."""
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]]
    absent = [*info["missing_keys"], *mismatched]
    wrong = [name for name in absent if name.split(".")[0] not in family.head]
    if wrong:
        raise ValueError(f"encoder.checkpoint={config.checkpoint} lacks {wrong[0]} ({len(wrong)} tensors in all)")
    return not absent


def _describe_shape(config: EncoderConfig, content: Mapping[str, Any]) -> ModelConfig:
    """An encoder's layer has the linears of GPT-2's."""
    return ModelConfig(
        name=config.name,
        num_layers=content["num_hidden_layers"],
        hidden_size=content["hidden_size"],
        num_heads=content["num_attention_heads"],
        ffn_hidden_size=content["intermediate_size"],
        vocab_size=content["vocab_size"],
        max_position_embeddings=content["max_position_embeddings"],
        checkpoint=config.checkpoint,
    )
