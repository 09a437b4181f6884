#!/usr/bin/env bash
# A life of two adapters over one base: trained, listed, switched, mixed in a batch, merged, exported, loaded by PEFT.
#
#   bash launch/adapters_example.sh [DIRECTORY]      NUM_STEPS=60 by default; about four minutes on two cores
#
# Given again with the same DIRECTORY it goes on where it stopped, and writes what follows training anew.
# The tasks are the packaged E2E sample and the same backwards: a restaurant's facts into a sentence, and a sentence
# into its facts. Needs an installation with the tests' packages (`bash launch/install.sh dev`), for PEFT at the end.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
DIR="${1:-runs/adapters-example-$(date +%Y%m%d-%H%M%S)}"
NUM_STEPS="${NUM_STEPS:-60}"
set +u # a site's modules may read what is not set
# shellcheck source=launch/env.sh
source launch/env.sh
set -u
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$DIR"
say() { printf '\n[example] %s\n' "$*"; }

say "two tasks: describe (facts -> sentence), and parse (sentence -> facts)"
python - "$DIR" <<'PYTHON'
import json, sys
from pathlib import Path

import lora_dist

sample, out = Path(lora_dist.__file__).parent / "assets" / "e2e_sample", Path(sys.argv[1])
for split in ("train", "valid"):
    pairs = [line.split("||") for line in (sample / f"{split}.txt").read_text().splitlines()]
    lines = (json.dumps({"context": sentence, "target": facts}) + "\n" for facts, sentence in pairs)
    (out / f"parse_{split}.jsonl").write_text("".join(lines))
PYTHON

TRAIN=(lora-dist train experiment=e2e_demo optim.lr=1e-2 "loop.num_steps=$NUM_STEPS" track=none resume=auto)
say "trained on two tensor-parallel processes, and on one"
"${TRAIN[@]}" topology=tp2 "run_dir=$DIR/describe"
"${TRAIN[@]}" topology=single "run_dir=$DIR/parse" data=jsonl data.name=parse \
    data.seq_len=256 "data.train=$DIR/parse_train.jsonl" "data.valid=$DIR/parse_valid.jsonl"

say "listed"
lora-dist adapters "directory=$DIR"

say "switched in place, merged into the same weights in turn"
lora-dist switch "adapters=['$DIR/describe/adapter','$DIR/parse/adapter']"

say "mixed in one batch: each row names its own adapter, or none"
python - "$DIR" <<'PYTHON'
import json, sys

facts = "name : The Vaults | Type : pub | price : cheap | area : riverside"
sentence = "The Vaults is a cheap pub by the riverside ."
run = sys.argv[1]
rows = [(facts, f"{run}/describe"), (sentence, f"{run}/parse"), (facts, None)]
with open(f"{run}/mixed.jsonl", "w") as file:
    for context, adapter in rows:
        file.write(json.dumps({"context": context, "adapter": adapter}) + "\n")
PYTHON
lora-dist generate "adapters=['$DIR/describe','$DIR/parse']" "generate.input=$DIR/mixed.jsonl" \
    generate.format=jsonl "generate.output=$DIR/mixed_texts.jsonl" generate.max_new_tokens=40
cat "$DIR/mixed_texts.jsonl"

say "merged into a checkpoint of its own: no adapter is left to cost latency"
rm -rf "$DIR/describe_merged" "$DIR/describe_peft" # of an earlier call: neither verb writes over a directory
lora-dist merge "adapter=$DIR/describe/adapter" "output=$DIR/describe_merged"

say "exported, and loaded by PEFT over transformers' own model"
lora-dist export "adapter=$DIR/describe/adapter" "output=$DIR/describe_peft" format=peft
python - "$DIR" <<'PYTHON'
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel

import lora_dist

run, base = Path(sys.argv[1]), Path(lora_dist.__file__).parent / "assets" / "demo_base"
tokens = torch.arange(40).view(2, 20)


def compute_logits(directory, adapter=None):
    """In fp32, whatever the files hold."""
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(tokens).logits


adapted = compute_logits(base, run / "describe_peft")
change = (adapted - compute_logits(base)).abs().max().item()
error = (adapted - compute_logits(run / "describe_merged")).abs().max().item()
print(f"PEFT's adapter changes the base's logits by {change:.1e}; those of the merged checkpoint, whose weights are")
print(f"rounded to the base's fp16 once, differ from PEFT's by {error:.1e}")
assert error < 1e-2 * change, "the adapter and the merged checkpoint are not the same model"
PYTHON
say "all of it is in $DIR"
