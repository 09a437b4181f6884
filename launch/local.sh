#!/usr/bin/env bash
# One verb on this machine; with a topology of N processes it starts N here.
#
#   bash launch/local.sh train experiment=e2e_demo topology.dp_size=2
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$ROOT/launch/install.sh"
set +u # a site's modules may read what is not set
# shellcheck source=launch/env.sh
source "$ROOT/launch/env.sh"
set -u
exec "$ROOT/.venv/bin/lora-dist" "$@"
