#!/usr/bin/env bash
# Measures one GPU and leaves the records: `bash tools/gpu_suite.sh [PART ...]`, all parts without a PART.
#
#   check    tests marked gpu: GPU against CPU, planned against allocated memory   (5 minutes)
#   train    LoRA, full fine-tuning and HF PEFT on GPT-2 medium to Llama 3 8B      (10 minutes)
#   micro    latency (the paper's table 1), linears with an adapter, windows, packing (3 minutes)
#   nf4      GPT-3 175B on one GPU of 140 GB, its base in nf4                      (8 minutes)
#
#   PYTHON             the interpreter (default .venv/bin/python), with lora_dist's packages or, without a network,
#   WHEELS             a directory of wheels that it lacks: they are installed into a temporary directory
#   LORA_DIST_COMMIT   the commit of the source, where this is a copy without .git
#
# `bash tools/gpu_suite.sh --list` prints each bench's name and overrides and runs nothing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RECORDS=tools/records
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
LIST=false
if [[ ${1:-} == --list ]]; then
    LIST=true
    shift
fi

say() { printf '[gpu] %s\n' "$*"; }

bench() {
    local name=$1
    shift
    local overrides=(data=fake track=none device=cuda dtype=bf16 "$@")
    if $LIST; then
        (IFS=$'\t'; printf '%s\t%s\n' "$name" "${overrides[*]}")
        return
    fi
    say "$name"
    if "$PYTHON" -m lora_dist.cli.main bench run_dir="$SCRATCH/$name" "${overrides[@]}"; then
        cp "$SCRATCH/$name/bench.json" "$RECORDS/bench/$name.json"
    else
        FAILED+=("$name")
    fi
}

run_check() {
    local files
    # These alone: the others ask for packages (wandb, metrics) that a bare machine need not have. Most of their time is
    # starting processes, and none measures time.
    mapfile -t files < <(grep -rlE --include='test_*.py' '^@pytest\.mark\.gpu' tests)
    "$PYTHON" -m pytest -n 4 -m gpu "${files[@]}" || FAILED+=(check)
}

run_train() {
    local ours='bench.contenders=[lora,full,lora_recompute,full_recompute]'
    bench gpu_gpt2_medium model=gpt2_medium data.seq_len=1024 loop.micro_batch_size=8 \
        'bench.contenders=[lora,full,lora_recompute,full_recompute,lora_compiled,full_compiled,lora_graphs,full_graphs,peft,peft_tuned]'
    bench gpu_gpt3_1_3b model=gpt3_1_3b data.seq_len=2048 loop.micro_batch_size=2 loop.global_batch_size=16 "$ours"
    bench gpu_gpt3_6_7b model=gpt3_6_7b data.seq_len=2048 loop.micro_batch_size=4 'bench.contenders=[lora,lora_recompute]'
    bench gpu_gpt3_6_7b_peft model=gpt3_6_7b data.seq_len=2048 loop.micro_batch_size=2 \
        'bench.contenders=[lora,peft_tuned]'
    bench gpu_gpt3_13b model=gpt3_13b data.seq_len=2048 loop.micro_batch_size=4 'bench.contenders=[lora]'
    bench gpu_llama3_8b model=llama3_8b data.seq_len=2048 loop.micro_batch_size=2 'lora.target_modules=[all]' \
        lora.rank=16 'bench.contenders=[lora,peft_tuned]'
    bench gpu_llama3_8b_compiled model=llama3_8b data.seq_len=2048 loop.micro_batch_size=2 'lora.target_modules=[all]' \
        lora.rank=16 'bench.contenders=[lora,lora_compiled]'
}

run_micro() {
    say "latency and kernels"
    "$PYTHON" tools/latency_record.py --device cuda --dtype fp16 --rounds 50,50,200 --name gpu_gpt2_medium ||
        FAILED+=(latency)
    "$PYTHON" tools/kernel_bench.py --device cuda --dtype bf16 --num-tokens 8192 --num-rounds 50 \
        --record $RECORDS/kernels_gpu.json || FAILED+=(kernels)
    "$PYTHON" tools/window_record.py --device cuda --dtype bf16 --record $RECORDS/window/gpu_4096.json ||
        FAILED+=(windows)
    local seq_len
    for seq_len in 512 2048; do
        "$PYTHON" tools/packing_record.py --record "$RECORDS/packing/gpu_gpt3_1_3b_$seq_len.json" --rounds 20 \
            model=gpt3_1_3b model.vocab_size=4096 model.tokenizer=lora_dist/assets/demo_base data=e2e_demo \
            data.seq_len=$seq_len loop.micro_batch_size=$((8192 / seq_len)) dtype=bf16 device=cuda ||
            FAILED+=("packing_$seq_len")
    done
}

run_nf4() {
    bench gpu_gpt3_175b_nf4 model=gpt3_175b model.base_format=nf4_double data.seq_len=2048 loop.micro_batch_size=1 \
        'bench.contenders=[lora]' bench.num_rounds=5 bench.num_warmup_rounds=1
}

FAILED=()
if $LIST; then
    run_train
    run_nf4
    exit
fi
if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$SCRATCH/site"
fi
(($#)) || set -- check train micro nf4
for part in "$@"; do
    declare -F "run_$part" >/dev/null || { printf 'error: no part %s; give check, train, micro or nf4\n' "$part" >&2; exit 2; }
done
for part in "$@"; do
    "run_$part"
done
if ((${#FAILED[@]})); then
    say "failed: ${FAILED[*]}"
    exit 1
fi
say "records are in $RECORDS; python tools/readme_tables.py puts them into README.md"
