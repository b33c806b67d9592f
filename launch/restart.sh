#!/usr/bin/env bash
# Runs a command again until it succeeds:
#
#   launch/restart.sh python train.py --config C --workdir W
#
# It is for hosts without a scheduler of their own (tpu.sh). train.py resumes from its last
# checkpoint when it gets the same --workdir. After status 143 (SIGTERM to one of the processes,
# checkpoint saved) the command starts again at once. After another failure it starts again in
# PAUSE seconds, at most RESTARTS times in a row; a command that ran for an hour resets the count.
# SIGTERM to this script is passed on to the command and ends both.
set -uo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# == 0)); then
  echo "error: there is no command to run; $0 --help shows one" >&2
  exit 2
fi
for number in RESTARTS PAUSE; do
  if [[ -n ${!number:-} && ! ${!number} =~ ^[0-9]+$ ]]; then
    echo "error: $number is '${!number}'; it must be a whole number" >&2
    exit 2
  fi
done
limit=${RESTARTS:-10} pause=${PAUSE:-15} failures=0 stopped="" child=""

stop() {
  stopped=yes
  if [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null
  fi
}
trap stop TERM INT

while true; do
  began=$SECONDS child=""
  "$@" &
  child=$!
  if [[ -n $stopped ]]; then # the signal came before the child had a name
    kill -TERM "$child" 2>/dev/null
  fi
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends the first wait, the command still saves
    wait "$child"
    status=$?
  done
  if [[ $status == 0 || -n $stopped ]]; then
    exit "$status"
  fi
  if [[ $status == 143 ]]; then
    echo "restart.sh: stopped from outside (143), starting again" >&2
    continue
  fi
  if ((SECONDS - began >= 3600)); then
    failures=0
  fi
  failures=$((failures + 1))
  if ((failures > limit)); then
    echo "restart.sh: status $status, failed $failures times in a row: giving up" >&2
    exit "$status"
  fi
  echo "restart.sh: status $status, restart $failures of $limit in $pause s" >&2
  sleep "$pause"
done
