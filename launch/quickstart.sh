#!/usr/bin/env bash
# The main job from nothing: install, then LoRA beside full fine-tuning of the packaged model, and one report.
#
#   bash launch/quickstart.sh [key=value ...]        e.g. lora.rank=8 track=none
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
for word in "$@"; do
    case "$word" in run_dir=*) RUN_DIR="${word#run_dir=}" ;; esac
done
RUN_DIR="${RUN_DIR:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}"

bash launch/install.sh
set +u # a site's modules may read what is not set
# shellcheck source=launch/env.sh
source launch/env.sh
set -u
# Two tensor-parallel processes, except where they would have to share one GPU.
TOPOLOGY=tp2
if command -v nvidia-smi >/dev/null && [ "$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ]; then
    TOPOLOGY=single
fi
printf '[quickstart] LoRA and full fine-tuning of the demo model (topology=%s), into %s\n' "$TOPOLOGY" "$RUN_DIR"
.venv/bin/lora-dist compare experiment=e2e_demo "topology=$TOPOLOGY" "run_dir=$RUN_DIR" "$@"
printf '[quickstart] report: %s/report.md\n' "$RUN_DIR"
