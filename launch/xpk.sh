#!/usr/bin/env bash
# TPU slices on a GKE cluster that xpk made:
#
#   export NAME=internvl3 CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b TYPE=v6e-64 SLICES=2
#   export STORAGE=share IMAGE=REGISTRY/internvl3-jax:tpu
#   launch/xpk.sh --config=configs/X.py --workdir=/share/runs/X --config.mesh.slice=2
#
# IMAGE is launch/Dockerfile's. STORAGE is the name of a file system of `xpk storage attach` that
# every host sees and that holds --workdir. The run is restarted up to RESTARTS times: xpk does so
# for statuses above 127 (143: stopped by SIGTERM, 134: another host was lost, 137: killed), and
# here also for 1. `kubectl get pods` and `kubectl logs POD` show the hosts. XPK_FLAGS=--dry-run
# only shows what it would do.
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

need NAME "the name of the run" CLUSTER "the cluster" PROJECT "its project" ZONE "its zone" TYPE "the slices, such as v6e-64" \
  IMAGE "REGISTRY/internvl3-jax:tpu" STORAGE "the name of the storage"
if (($# == 0)); then
  echo "error: the arguments of train.py are missing; $0 --help shows them" >&2
  exit 2
fi
if ! command -v xpk >/dev/null; then
  echo "error: xpk is not installed; pip install xpk" >&2
  exit 1
fi

printf -v arguments '%q ' "$@"
# shellcheck disable=SC2086 # XPK_FLAGS are words
xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="${RESTARTS:-50}" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  --command="exec python -u train.py $arguments" ${XPK_FLAGS:-}
