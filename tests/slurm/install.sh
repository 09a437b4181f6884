#!/usr/bin/env bash
# Installs Slurm for tests/slurm where nobody need be asked: as root on Debian or Ubuntu. Elsewhere those tests are
# skipped and say why. Never fails.
set -euo pipefail

export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive
if command -v slurmctld >/dev/null || [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    exit 0
fi
printf '[tests] installing slurm-wlm and munge for tests/slurm\n'
{ timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
    >/dev/null 2>&1 || printf '[tests] apt-get could not install them\n'
