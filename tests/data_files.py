"""A tiny tokenizer and run configurations for the tests of the data package."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from lora_dist.config import (
    BenchConfig,
    CompareConfig,
    DataConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TopologyConfig,
    TrackConfig,
    ZeroConfig,
)
from lora_dist.data.tokenizer import load_tokenizer

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 290
_TEXT = "name : The Vaults | Type : pub | near : The Mill. The Vaults is a pub near The Mill in the riverside area."


def write_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A byte-level BPE in GPT-2's files (vocab.json, merges.txt), the end-of-text token its last."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([_TEXT], vocab_size=vocab_size - 1, min_frequency=1, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.get_vocab_size() == vocab_size
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8")) | {END_OF_TEXT: vocab_size - 1}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return directory


@cache
def tokenizer_directory() -> str:
    """One tokenizer for all tests of a process."""
    return str(write_tokenizer(Path(mkdtemp(prefix="tokenizer", dir=os.environ["LORA_DIST_CACHE"]))))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_directory(), VOCAB_SIZE)


def build_config(
    data: DataConfig, *, loop: LoopConfig | None = None, topology: TopologyConfig | None = None
) -> RunConfig:
    """A run on a model that fits the data and the tiny tokenizer."""
    model = ModelConfig(
        name="tiny",
        num_layers=1,
        hidden_size=8,
        num_heads=4,
        ffn_hidden_size=8,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=data.seq_len,
        tokenizer=tokenizer_directory(),
    )
    return RunConfig(
        model=model,
        method="lora",
        lora=LoraConfig(),
        topology=topology or TopologyConfig(),
        zero=ZeroConfig(),
        data=data,
        optim=OptimConfig(),
        loop=loop or LoopConfig(),
        track=TrackConfig(),
        compare=CompareConfig(),
        bench=BenchConfig(),
        run_dir="unused",
    )


def write_pairs(path: Path, num_pairs: int) -> Path:
    """`context||target` rows of different lengths, each context and target unlike all others."""
    rows = [f"name : {number}||{'The Vaults ' * (number * 7 % 5)}is {number}" for number in range(num_pairs)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
