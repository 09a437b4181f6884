# What the job scripts have in common; sourced by them on the first node of a job, in the folder of `sbatch`.
# shellcheck shell=bash

# The whole job: run_job VERB DEFAULT_EXPERIMENT [key=value ...]. Does not return.
#
# A run that stopped as asked (SIGUSR1 ahead of the time limit), one that lost a node, and one whose tasks were
# terminated while the job was not are queued again, under the same job id and so in the same run directory;
# `resume=auto` continues them. The last: Slurm may tell a node that is back to end a step of the start that lost it, and
# the steps of every start have the same numbers.
run_job() {
    local verb=$1 experiment=$2
    shift 2
    local -a overrides=()
    is_given experiment "$@" || overrides+=("experiment=$experiment")
    is_given run_dir "$@" || name_run
    is_given resume "$@" || overrides+=(resume=auto)
    overrides+=("$@")

    set_environment
    local cancelled=no stopped=no code=0 terminated=$((128 + 15))
    # Bash takes a signal after the command it waits for. Slurm has sent the same one to the tasks, which save.
    trap 'cancelled=yes' TERM
    say "start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
    # All tasks of a pre-flight check say the same; killing the slower ones would hide its exit code.
    run_tasks 0 preflight "${overrides[@]}" && run_tasks 1 "$verb" "${overrides[@]}" || code=$?
    # The tasks of a cancelled job may end a moment before its script is told.
    [ "$code" -ne "$terminated" ] || sleep 5

    [ ! -e "$LORA_DIST_STOP_FILE" ] || { stopped=yes && rm "$LORA_DIST_STOP_FILE"; }
    if [ "$cancelled" = yes ]; then
        say "cancelled"
    elif [ "$stopped" = yes ]; then
        queue_again "stopped as asked"
    elif [ "$code" -ne 0 ] && ! all_nodes_answer; then
        queue_again "a node is lost"
    elif [ "$code" -eq "$terminated" ]; then
        queue_again "its tasks were terminated, the job was not"
    fi
    say "end, exit code $code"
    exit "$code"
}

say() { printf '[slurm] %(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

# Whether the user gave this key.
is_given() {
    local key=$1 word
    shift
    for word in "$@"; do
        [[ $word != "$key="* ]] || return 0
    done
    return 1
}

# The run directory and the W&B run by the job's name and id, which a requeued job keeps. Where the user names a run
# directory, the W&B run is the one noted there.
name_run() {
    local name="${SLURM_JOB_NAME//[^A-Za-z0-9._-]/_}-$SLURM_JOB_ID"
    overrides+=("run_dir=runs/$name" "track.run_id=$name")
}

set_environment() {
    # What a shell inside another job may have left behind would number these tasks wrongly.
    unset RANK LOCAL_RANK WORLD_SIZE
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    # srun stopped inheriting --cpus-per-task in Slurm 22.05.
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
    export PYTHONUNBUFFERED=1
    # Made by process 0, which runs on this node, when a run stopped as asked: with an exit code of its own the first
    # process to leave would have srun kill the others.
    export LORA_DIST_STOP_FILE="$PWD/.lora_dist-stopped-$SLURM_JOB_ID"
    rm -f "$LORA_DIST_STOP_FILE"
    SRUN_OPTIONS=()
    PYTHON="${PYTHON:-$LORA_DIST_ROOT/.venv/bin/python}"
    export PYTHONPATH="$LORA_DIST_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    set +u # a site's modules may read what is not set
    # shellcheck source=launch/env.sh
    source "$LORA_DIST_ROOT/launch/env.sh"
    set -u
}

# One task a GPU, and python itself as the task: Slurm signals the process it started, not the children of a wrapper.
# $1 is 1 where one task that fails ends the others at once.
run_tasks() {
    local kill=$1
    shift
    srun "--kill-on-bad-exit=$kill" --wait=120 --label "${SRUN_OPTIONS[@]}" "$PYTHON" -m lora_dist.cli.main "$@"
}

# A dead node makes the tasks of the others fail before Slurm misses it, and that would look like a run that failed.
all_nodes_answer() {
    timeout 60 srun --quiet --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

# A job that keeps losing nodes, or gets nowhere within its time limit, must not come back for ever.
queue_again() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if [ "$restarts" -ge "$LORA_DIST_MAX_RESTARTS" ]; then
        say "$1; not queued again after $restarts restarts (LORA_DIST_MAX_RESTARTS)" >&2
        exit 1
    fi
    say "$1; queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "cannot be queued again; submit it with run_dir= of this run and resume=auto to continue" >&2
    exit 1
}
