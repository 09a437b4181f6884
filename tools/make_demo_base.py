"""Pretrain the demo base: a small GPT-2 with its own byte-level BPE, from plain text, on a CPU.

    python tools/make_demo_base.py --corpus DIR --out lora_dist/assets/demo_base --minutes 40

Writes an ordinary Hugging Face checkpoint (fp16 safetensors, tokenizer files) and training_log.json.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
SEQ_LEN = 256
VALID_FRACTION = 0.02


@dataclass(kw_only=True)
class LogEntry:
    """Losses are means a token, in nats."""

    minutes: float
    step: int
    tokens: int
    train_loss: float
    valid_loss: float


def read_corpus(directory: Path) -> list[str]:
    """The text of every .txt and .md file, in the order of their names. ValueError where there is none."""
    files = sorted(p for p in directory.rglob("*") if p.suffix in (".txt", ".md") and p.name != "SOURCE.txt")
    if not files:
        raise ValueError(f"--corpus {directory} holds no .txt or .md file")
    return [path.read_text(encoding="utf-8") for path in files]


def train_tokenizer(texts: list[str], vocab_size: int, out: Path) -> ByteLevelBPETokenizer:
    """A byte-level BPE in GPT-2's form; the end-of-text token is its last, as in GPT-2."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    tokenizer.save_model(str(out))
    tokenizer.save(str(out / "tokenizer.json"))
    vocab_file = out / "vocab.json"
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    vocab[END_OF_TEXT] = tokenizer.token_to_id(END_OF_TEXT)
    vocab_file.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": SEQ_LEN, "add_prefix_space": False, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def encode_corpus(texts: list[str], tokenizer: ByteLevelBPETokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, valid) token streams; every text gives its last part to validation."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    train: list[int] = []
    valid: list[int] = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        split = int(len(ids) * (1 - VALID_FRACTION))
        train += [*ids[:split], end]
        valid += [*ids[split:], end]
    return torch.tensor(train), torch.tensor(valid)


def draw_batch(stream: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, SEQ_LEN] windows from random places of the stream."""
    starts = torch.randint(0, len(stream) - SEQ_LEN, (rows,), generator=generator)
    return torch.stack([stream[start : start + SEQ_LEN] for start in starts])


@torch.no_grad()
def compute_valid_loss(model: GPT2LMHeadModel, valid: torch.Tensor, num_rows: int = 64) -> float:
    """Mean loss over evenly spaced windows of the held-out text."""
    model.eval()
    starts = torch.linspace(0, len(valid) - SEQ_LEN, num_rows).long()
    rows = torch.stack([valid[start : start + SEQ_LEN] for start in starts])
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def build_optimizer(model: GPT2LMHeadModel, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def pretrain(
    model: GPT2LMHeadModel,
    train: torch.Tensor,
    valid: torch.Tensor,
    *,
    minutes: float,
    lr: float,
    rows: int,
    bf16: bool,
) -> list[LogEntry]:
    """Train until the minutes are over; warm-up and cosine follow the share of them that has passed."""
    optimizer = build_optimizer(model, lr)
    generator = torch.Generator().manual_seed(0)
    log: list[LogEntry] = []
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, share / 0.02) * 0.5 * (1 + math.cos(math.pi * share)) + 1e-6
        batch = draw_batch(train, rows, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 200 == 0:
            log.append(_describe(model, valid, start, step, rows, loss.item()))
    log.append(_describe(model, valid, start, step, rows, loss.item()))
    return log


def _describe(
    model: GPT2LMHeadModel, valid: torch.Tensor, start: float, step: int, rows: int, train_loss: float
) -> LogEntry:
    entry = LogEntry(
        minutes=round((time.monotonic() - start) / 60, 2),
        step=step,
        tokens=step * rows * SEQ_LEN,
        train_loss=round(train_loss, 4),
        valid_loss=round(compute_valid_loss(model, valid), 4),
    )
    print(entry, flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="directory of .txt and .md files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens a step")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster on CPUs that multiply in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = read_corpus(args.corpus)
    tokenizer = train_tokenizer(texts, args.vocab_size, args.out)
    train, valid = encode_corpus(texts, tokenizer)
    print(f"{len(texts)} texts, {len(train):,} training tokens, {len(valid):,} held out", flush=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=SEQ_LEN,
        n_embd=256,
        n_layer=4,
        n_head=8,
        activation_function="gelu_pytorch_tanh",  # gelu_new's function in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    log = pretrain(model, train, valid, minutes=args.minutes, lr=args.lr, rows=args.rows, bf16=args.bf16)
    model.half().save_pretrained(args.out)
    record = {"arguments": {k: v for k, v in vars(args).items() if k not in ("corpus", "out")}}
    record |= {"num_train_tokens": len(train), "num_valid_tokens": len(valid), "log": [asdict(entry) for entry in log]}
    (args.out / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
