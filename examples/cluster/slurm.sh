#!/usr/bin/env bash
# Four machines under Slurm, one worker on each, all of the machine's GPUs in it:
#
#     sbatch examples/cluster/slurm.sh train.py --any --arguments
#
# Slurm ends and requeues the job on preemption; with a tfzero.CheckpointCallback it goes on where it stopped.
#SBATCH --job-name=tfzero
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -euo pipefail

port="${TFZERO_PORT:-23456}"
addresses="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/.*/\"&:$port\"/" | paste -sd,)"
export TFZERO_ADDRESSES="$addresses"

# Each task is the worker of its own number. `exec`: signals reach the program, which saves on SIGTERM.
srun --kill-on-bad-exit=1 bash -c '
    export TF_CONFIG="{\"cluster\": {\"worker\": [$TFZERO_ADDRESSES]},
                       \"task\": {\"type\": \"worker\", \"index\": $SLURM_PROCID}}"
    exec python "$@"
' worker "$@"
