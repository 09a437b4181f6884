"""Tiny random checkpoints of the real encoder classes, and a sentiment file that they can learn."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from lora_dist.classify_config import ClassifyConfig, EncoderConfig
from lora_dist.config import LoopConfig, LoraConfig, OptimConfig, TrackConfig
from lora_dist.encoders.job import Job, load_data, open_job
from lora_dist.task_config import TaskConfig
from lora_dist.topology import Topology

ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a", "it", "was"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "max_relative_positions": 8,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
    "pooler_dropout": 0.0,
}
ROBERTA_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
"""Its real size, but for the vocabulary."""
FAMILIES = ("roberta", "deberta", "deberta-v2")


def build_base(family: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "roberta":
        return RobertaModel(RobertaConfig(**{**SIZES, **sizes}, type_vocab_size=1), add_pooling_layer=False)
    if family == "deberta":
        return DebertaModel(DebertaConfig(**SIZES, **_RELATIVE))
    v2 = {"share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}
    return DebertaV2Model(DebertaV2Config(**SIZES, **_RELATIVE, **v2))


def write_encoder(directory: Path, family: str, sizes: dict[str, Any] | None = None) -> Path:
    """A base without a head, as they are published, and a tokenizer that knows WORDS; `sizes` are a RoBERTa's."""
    build_base(family, sizes or {}).save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        model_input_names=["input_ids", "attention_mask"],
    )
    whole.save_pretrained(directory)
    return directory


def write_sst2(path: Path, num_rows: int) -> Path:
    """GLUE's SST-2 file: the label is whether the sentence's adjective is a good one."""
    rows = []
    for row in range(num_rows):
        adjective = WORDS[row % 6]
        noun = WORDS[6 + row % 2]
        rows.append(f"the {noun} was {adjective}{' it was' * (row % 3)}\t{int(row % 6 < 3)}")
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return path


def write_rte(path: Path) -> Path:
    rows = ["0\tthe film was good\tit was good\tentailment", "1\tthe plot was bad\tit was great\tnot_entailment"]
    path.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    return path


def build_config(tmp_path: Path, family: str, *, method: str = "lora", **options: object) -> ClassifyConfig:
    checkpoint, train = tmp_path / family, tmp_path / "train.tsv"
    if not checkpoint.exists():
        write_encoder(checkpoint, family)
    if not train.exists():
        write_sst2(train, 48)
        write_sst2(tmp_path / "dev.tsv", 7)
    values: dict = {
        "encoder": EncoderConfig(name=family, checkpoint=str(checkpoint), seq_len=16, method=method),
        "task": TaskConfig(
            name="glue_sst2", format="glue_sst2", metric="accuracy", references=str(tmp_path / "dev.tsv")
        ),
        "run_dir": str(tmp_path / "run"),
        "train": str(train),
        "lora": LoraConfig(rank=3, alpha=6.0, target_modules=ALL_TARGETS),
        "optim": OptimConfig(lr=1e-2, schedule="constant", eps=1e-4),
        "loop": LoopConfig(micro_batch_size=2, global_batch_size=8, num_steps=3),
        "track": TrackConfig(backend="none"),
        "device": "cpu",
    }
    return ClassifyConfig(**{**values, **options})


def open_alone(config: ClassifyConfig, topology: Topology) -> Job:
    return open_job(config, topology, load_data(config))
