#!/usr/bin/env bash
# N processes of one command on this machine.
#
#   launch/local.sh [--dry-run] N COMMAND [ARGUMENT ...]
#   launch/local.sh 2 wmss run recipe.yaml data=DIR
#   JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 launch/local.sh 2 wmss run recipe.yaml data=DIR    # 2 x 4 simulated devices
#   WMSS_DEVICES_PER_PROCESS=4 launch/local.sh 2 wmss run recipe.yaml data=DIR                 # 8 GPUs, 4 for each
#
# From the environment (default):
#   WMSS_PORT (a free one)              where process 0 listens for the others
#   WMSS_DEVICES_PER_PROCESS (all)      process i is given GPUs i*n to i*n+n-1
#   WMSS_GRACE (120)                    seconds for the others to end once one has failed or a signal was passed on
#
# Every line of output begins with its process's number. SIGTERM, SIGINT and SIGHUP go to all processes, which save
# and exit with 75. The exit code is the first that was not 0.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

dry_run=""
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
count=$1
shift

grace=${WMSS_GRACE:-120}
per_process=${WMSS_DEVICES_PER_PROCESS:-}

free_port() { # below 32768, where the system takes ports for outgoing connections from
  local port
  while true; do
    port=$((20000 + RANDOM % 12768))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break # nobody answers
  done
  echo "$port"
}

variables() { # of process $1, one NAME=VALUE a line
  echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
  echo "JAX_NUM_PROCESSES=$count"
  echo "JAX_PROCESS_ID=$1"
  if [[ -n $per_process ]]; then
    echo "JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * per_process)) $(($1 * per_process + per_process - 1)))"
  fi
}

port=${WMSS_PORT:-$(free_port)}
if [[ -n $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    mapfile -t settings < <(variables "$i")
    printf '+ env'
    printf ' %q' "${settings[@]}" "$@"
    echo
  done
  exit 0
fi

prefix() { # outlives its process, and the signals of a terminal, so that no last words are lost
  trap '' INT TERM HUP
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

declare -A running=() # process id -> number
readers=()
deadline="" # in SECONDS; once it is set, whoever runs longer is killed

# shellcheck disable=SC2329  # the traps call it
signal_all() {
  deadline=${deadline:-$((SECONDS + grace))}
  local pid
  for pid in "${!running[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'signal_all TERM' TERM HUP
trap 'signal_all INT' INT

export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
for ((i = 0; i < count; i++)); do
  mapfile -t settings < <(variables "$i")
  exec {out}> >(prefix "$i")
  readers+=($!)
  set -m # a process group of its own: to be killed whole, and to hear SIGINT, which bash has its background jobs ignore
  env "${settings[@]}" "$@" >&"$out" 2>&1 {out}>&- &
  set +m
  running[$!]=$i
  exec {out}>&-
done

code=0
while ((${#running[@]})); do
  for pid in "${!running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
        echo "local.sh: process ${running[$pid]} still ran $grace s later: killed" >&2
        kill -KILL -- "-$pid" 2>/dev/null || true
      fi
      continue
    fi
    ended=0
    wait "$pid" || ended=$?
    if ((ended != 0)); then
      echo "local.sh: process ${running[$pid]} exited with $ended" >&2
      ((code != 0)) || code=$ended
      deadline=${deadline:-$((SECONDS + grace))}
    fi
    unset "running[$pid]"
  done
  sleep 0.2 || true # a signal ends it, too
done
wait "${readers[@]}" || true
exit "$code"
