#!/usr/bin/env bash
# One TPU slice, or several, as a queued resource of Google Cloud:
#
#   export NAME=internvl3 ZONE=europe-west4-b TYPE=v5litepod-64 SHARE=10.0.0.2:/share
#   launch/tpu.sh create          # waits in the queue until the slices are there
#   launch/tpu.sh setup           # this commit and its packages on every host, SHARE at /share
#   launch/tpu.sh run --config configs/X.py --workdir /share/runs/X
#   launch/tpu.sh logs            # follows the log of every host; Ctrl-C does not stop the run
#   launch/tpu.sh stop            # SIGTERM: saves and ends
#   launch/tpu.sh delete
#
# SLICES=4 takes four slices (run with --config.mesh.slice=4); SPOT=yes takes slices that may be
# preempted. --workdir must be the same files on every host: SHARE is an NFS export, such as
# Filestore's, in the slices' network. The processes find each other through the metadata of the TPU
# VMs. restart.sh on every host restarts the run after a failure. After a preemption of spot slices:
# delete, create, setup, and run with the same --workdir.
#
# It needs gcloud, logged in and with a project, and its key in ssh's agent
# (ssh-add ~/.ssh/google_compute_engine). See docs/launch.md.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
# need NAME MEANING ...: each of these variables is set
need() {
  while (($# > 0)); do
    if [[ -z ${!1:-} ]]; then
      echo "error: $1 is not set: $2; export it first, as $0 --help shows" >&2
      exit 2
    fi
    shift 2
  done
}

case ${1:-} in
create | setup | run | logs | stop | delete) ;;
*)
  echo "error: '${1:-}' is not a command; there are create, setup, run, logs, stop and delete, as $0 --help shows" >&2
  exit 2
  ;;
esac
need NAME "the name of the queued resource" ZONE "its zone, such as europe-west4-b" TYPE "the accelerator, such as v5litepod-64, v5p-128, v6e-256"
SLICES=${SLICES:-1}
if [[ ! $SLICES =~ ^[1-9][0-9]*$ ]]; then
  echo "error: SLICES is '$SLICES'; it must be a whole number" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "error: gcloud is not installed; https://cloud.google.com/sdk/docs/install" >&2
  exit 1
fi
cd "$(dirname "$0")/.."

case $TYPE in
v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
*) need RUNTIME "the runtime version of $TYPE" ;;
esac

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

everywhere() { queue ssh --node=all --worker=all --command="$1"; }

create() {
  local nodes=(--node-id="$NAME")
  if ((SLICES > 1)); then
    nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  if [[ ${SPOT:-} == yes ]]; then
    nodes+=(--spot)
  fi
  queue create --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${nodes[@]}"
  local state=""
  until [[ $state == ACTIVE ]]; do
    state=$(queue describe --format="value(state.state)")
    echo "$(date +%T) $state"
    if [[ $state == FAILED || $state == SUSPENDED ]]; then
      queue describe
      exit 1
    fi
    sleep 30
  done
}

setup() {
  local archive
  archive=$(mktemp -d)/internvl3_jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus queued-resources scp "$archive" "$NAME": --zone="$ZONE" --node=all --worker=all
  # The system's Python is older than 3.11; uv brings one.
  everywhere "set -e
    mkdir -p internvl3_jax && tar -xzf internvl3_jax.tar.gz -C internvl3_jax
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 venv
    ~/.local/bin/uv pip install --quiet --python venv --constraint internvl3_jax/requirements/constraints-3.12.txt './internvl3_jax[tpu,video,logging]'
    if [[ -n '${SHARE:-}' ]] && ! mountpoint --quiet /share; then
      sudo apt-get install --quiet --yes nfs-common
      sudo mkdir -p /share && sudo mount '${SHARE:-}' /share
    fi"
}

run() {
  local command
  printf -v command '%q ' "$@"
  everywhere "cd internvl3_jax && nohup setsid launch/restart.sh ~/venv/bin/python -u train.py $command > ~/train.log 2>&1 < /dev/null &"
}

case ${1:-} in
create) create ;;
setup) setup ;;
run) run "${@:2}" ;;
logs) everywhere "tail -n 50 -F train.log | sed -u \"s/^/\$(hostname): /\"" ;;
stop) everywhere 'pkill -TERM -f "launch/[r]estart.sh"' ;; # the brackets: not this shell itself
delete) queue delete --force --quiet ;;
esac
