#!/usr/bin/env bash
#SBATCH --job-name=internvl3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# GPUs under SLURM:   sbatch launch/slurm.sh --config configs/X.py --workdir /shared/runs/X
#
# One process per GPU; they find each other through SLURM's variables. One process per node works as
# well: --ntasks-per-node=1. Submit it from the clone. All nodes must see the clone, the virtual
# environment in it, and --workdir. Partition, account and the number of nodes are arguments of
# sbatch: `sbatch --partition=... --nodes=...`. Lines of the log begin with the process's number.
#
# 300 s before the time limit SLURM sends SIGTERM; train.py saves and exits with 143. The job is
# then requeued, as after a failure (a lost node: 134), up to RESTARTS times, and resumes from its
# last checkpoint.
set -uo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '/^# /,/^[^#]/s/^#\( \|$\)//p' "$0"
  exit
fi
if [[ -z ${SLURM_SUBMIT_DIR:-} ]]; then
  echo "error: this is a job of SLURM: sbatch $0 $*" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR" || exit

srun --kill-on-bad-exit=1 --label "${PYTHON:-.venv/bin/python}" -u train.py "$@"
status=$?

restarts=${SLURM_RESTART_COUNT:-0}
if ((status != 0 && restarts < ${RESTARTS:-20})); then
  echo "status $status, restart $((restarts + 1)) of ${RESTARTS:-20}"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
