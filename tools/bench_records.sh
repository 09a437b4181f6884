#!/usr/bin/env bash
# Makes the CPU records of tools/records/bench/ anew: `bash tools/bench_records.sh [NAME ...]`, all of them without a NAME.
# Needs the tests' installation (launch/install.sh dev: peft) and a clean checkout; about 40 minutes of one core.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT

record() {
    local name=$1
    shift
    [[ ${#WANTED[@]} -eq 0 || " ${WANTED[*]} " == *" $name "* ]] || return 0
    printf '[bench] %s\n' "$name"
    .venv/bin/lora-dist bench data=fake data.seq_len=256 track=none device=cpu run_dir="$RUNS/$name" "$@"
    cp "$RUNS/$name/bench.json" "tools/records/bench/$name.json"
}

WANTED=("$@")
GPT2=(model=gpt2_small loop.micro_batch_size=4)
record cpu_demo model=demo model.checkpoint=null loop.micro_batch_size=8 bench.num_rounds=20 \
    bench.num_warmup_rounds=5 'bench.contenders=[lora,full,peft,peft_tuned,hf_full]'
record cpu_gpt2_small "${GPT2[@]}" bench.num_rounds=10 bench.num_warmup_rounds=2 \
    'bench.contenders=[lora,full,lora_compiled,peft,peft_tuned]'
record cpu_gpt2_small_half_targets "${GPT2[@]}" bench.num_rounds=8 bench.num_warmup_rounds=2 \
    bench.target_fraction=0.5 'bench.contenders=[lora,peft,peft_tuned]'
record cpu_llama3_2_1b_half model=llama3_2_1b model.name=llama3_2_1b_half model.num_layers=8 loop.micro_batch_size=2 \
    'lora.target_modules=[all]' lora.rank=16 lora.dropout=0.05 bench.num_rounds=6 bench.num_warmup_rounds=1 \
    'bench.contenders=[lora,lora_compiled,peft]'
# Two layers of Qwen3 30B-A3B with half of its experts: PEFT makes each expert's whole weight anew in every step.
record cpu_qwen3_experts model=qwen3_30b_a3b model.name=qwen3_experts model.num_layers=2 model.num_experts=64 \
    model.vocab_size=32768 loop.micro_batch_size=2 'lora.target_modules=[all,gate_proj,up_proj,down_proj]' lora.rank=8 \
    bench.num_rounds=5 bench.num_warmup_rounds=1 'bench.contenders=[lora,peft]'
record cpu_gpt2_small_8k "${GPT2[@]}" loop.global_batch_size=32 bench.num_rounds=5 bench.num_warmup_rounds=1 \
    'bench.contenders=[lora,full,lora_recompute,full_recompute]'
