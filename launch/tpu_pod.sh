#!/usr/bin/env bash
# A command on every host of a Cloud TPU slice, kept going until it is done.
#
#   launch/tpu_pod.sh [--dry-run] up COMMAND [ARGUMENT ...]      create, install, run; again after a preemption or 75
#   WMSS_TPU_TYPE=v5p-128 WMSS_TPU_ZONE=us-east5-a launch/tpu_pod.sh up wmss run recipe.yaml data=DIR work_dir=DIR
#
# or one step at a time:
#   create             asks for the slice and waits until it is there
#   install            copies the wheel and configs/ to every host and makes an environment there
#   run COMMAND ...    starts it on all hosts and follows it to its end;  wait: follows one that runs already
#   status             the slice's state, and the command's on every host
#   logs               follows the log of host 0; WMSS_WORKER=all: of all
#   stop               SIGTERM to all: the command saves and ends with 75 (end `up` first: it would start it again)
#   delete             gives the slice back; until then it costs
#
# From the environment (default):
#   WMSS_TPU_NAME (wmss)            WMSS_TPU_TYPE (v5p-8)          WMSS_TPU_ZONE, WMSS_TPU_PROJECT (gcloud's own)
#   WMSS_TPU_RUNTIME (v2-alpha-tpuv5)   v5p: that; v5e: v2-alpha-tpuv5-lite; v6e: v2-alpha-tpuv6e
#   WMSS_TPU_SPOT (1)               0: not preemptible, at the full price
#   WMSS_TPU_QUEUED (1)             0: now or not at all, instead of as a queued resource
#   WMSS_TPU_VALID_UNTIL (none)     6h: take the request back if it has waited so long
#   WMSS_EXTRAS (tpu,data,tracking) of the package      WMSS_PYTHON (3.12)
#   WMSS_COPY (none)                what else goes to every host, seen from the repository's root: "data my.yaml"
#   WMSS_SETUP (none)               runs on every host before the command is installed: mounts what data and work_dir lie
#                                   on, as in "mkdir -p ~/bucket && gcsfuse --implicit-dirs BUCKET ~/bucket"
#   WMSS_FORWARD (HF_TOKEN WANDB_API_KEY)      variables that `install` takes there; in a file, never in a command
#   WMSS_POLL (30)                  WMSS_GRACE (120)               seconds between two looks; for the other hosts to end
#   WMSS_MAX_RESTARTS (100)         WMSS_DELETE (0)                1: `up` gives the slice back at the end
#
# The command runs in ~/wmss of every host, detached: a broken connection does not end it. JAX finds the other hosts
# from the slice's metadata. work_dir has to be seen by all hosts and outlive them: WMSS_SETUP. Exit codes are the command's.
set -euo pipefail

show() {
  printf '+' >&3
  printf ' %q' "$@" >&3
  echo >&3
}

# -- on a host of the slice: `tpu_pod.sh host install|start|state|stop|kill|hold` ------------------------------------
host() {
  cd "$HOME/wmss"
  local verb=$1
  shift
  case $verb in
    install) # PYTHON EXTRAS. Images of TPU hosts come with an older Python; uv brings the right one
      chmod 600 environment
      python3 -m pip install --quiet --user --upgrade uv
      python3 -m uv venv --quiet --python "$1" venv
      python3 -m uv pip install --quiet --python venv/bin/python -c constraints.txt "$(echo ./*.whl)[$2]"
      ;;
    start)
      if [[ $(host state) == "state: running" ]]; then echo "a command is running already" >&2 && exit 2; fi
      rm -f exit_code pid
      setsid "$BASH" "$HOME/wmss/tpu_pod.sh" host hold "$@" >>log 2>&1 </dev/null &
      local tries
      for ((tries = 0; tries < 100; tries++)); do
        if [[ -e pid ]]; then return; fi # from now on `state` knows
        sleep 0.1
      done
      tail -n 5 log >&2
      return 1
      ;;
    hold) # lives as long as the command, and writes down how it ended
      set -a
      # shellcheck source=/dev/null
      . ./environment
      set +a
      export PATH=$HOME/wmss/venv/bin:$PATH PYTHONUNBUFFERED=1
      "$@" &
      echo $! >pid
      local code=0
      wait $! || code=$?
      echo "$code" >exit_code.part && mv exit_code.part exit_code
      ;;
    state) # one line; "lost" when the host was started anew
      if [[ -e exit_code ]]; then
        echo "state: $(<exit_code)"
      elif [[ -e pid ]] && kill -0 "$(<pid)" 2>/dev/null; then
        echo "state: running"
      else
        echo "state: lost"
      fi
      ;;
    stop) kill -TERM "$(<pid)" 2>/dev/null || true ;;
    kill) kill -KILL "$(<pid)" 2>/dev/null || true ;;
  esac
}

if [[ ${1:-} == host ]]; then
  shift
  host "$@"
  exit
fi

# -- here -------------------------------------------------------------------------------------------------------------
name=${WMSS_TPU_NAME:-wmss}
type=${WMSS_TPU_TYPE:-v5p-8}
runtime=${WMSS_TPU_RUNTIME:-v2-alpha-tpuv5}
queued=${WMSS_TPU_QUEUED:-1}
spot=${WMSS_TPU_SPOT:-1}
poll=${WMSS_POLL:-30}
grace=${WMSS_GRACE:-120}
where=()
if [[ -n ${WMSS_TPU_ZONE:-} ]]; then where+=(--zone="$WMSS_TPU_ZONE"); fi
if [[ -n ${WMSS_TPU_PROJECT:-} ]]; then where+=(--project="$WMSS_TPU_PROJECT"); fi
tpus=(gcloud compute tpus)
cd "$(dirname "$0")/.." # where configs/ is; WMSS_COPY is seen from here

dry_run=""
exec 3>&2 # where commands are shown: beside what they print, or, in a dry run, instead of it
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  exec 3>&1
  shift
fi

say() { echo "tpu_pod.sh: $*" >&2; }

run() {
  show "$@"
  if [[ -z $dry_run ]]; then "$@"; fi
}

on() { # on HOSTS LINE: a line of bash on "all" or on one of them
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

slice_state() { # READY, WAITING_FOR_RESOURCES, PREEMPTED, ...; nothing if there is none; UNKNOWN if nobody says
  local describe=("${tpus[@]}" tpu-vm describe "$name" "${where[@]}" --format='value(state)') state
  if [[ $queued == 1 ]]; then
    describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
  fi
  if state=$(run "${describe[@]}" 2>&1); then
    echo "${state##*$'\n'}" # its last line: warnings may come before it
  elif [[ $state != *NOT_FOUND* ]]; then
    say "$state"
    echo UNKNOWN
  fi
}

is_there() { [[ $1 == READY || $1 == ACTIVE ]]; }

create() {
  local flags=(--accelerator-type="$type")
  if [[ $spot == 1 ]]; then flags+=(--spot); fi
  if [[ $queued == 1 ]]; then
    if [[ -n ${WMSS_TPU_VALID_UNTIL:-} ]]; then flags+=(--valid-until-duration="$WMSS_TPU_VALID_UNTIL"); fi
    flags+=(--node-id="$name" --runtime-version="$runtime")
    run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "${flags[@]}"
  else
    run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" --version="$runtime" "${flags[@]}"
  fi
  local state
  while true; do
    state=$(slice_state)
    if [[ -n $dry_run ]]; then return; fi
    if is_there "$state"; then return; fi
    case $state in
      *FAILED* | SUSPEND* | PREEMPTED | TERMINATED | "") say "the slice is ${state:-gone}" && return 75 ;;
    esac
    say "the slice is $state"
    sleep "$poll"
  done
}

delete() {
  if [[ $queued == 1 ]]; then
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet # with its slice
  else
    run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

install() {
  local parcel=build/tpu_pod/wmss variable copies
  read -ra copies <<<"configs constraints.txt launch/tpu_pod.sh ${WMSS_COPY:-}"
  run rm -rf "$parcel"
  run mkdir -p "$parcel"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir "$parcel" .
  run cp -r "${copies[@]}" "$parcel"
  echo "# to $parcel/environment: ${forward[*]}" >&3
  if [[ -z $dry_run ]]; then
    (
      umask 077
      for variable in "${forward[@]}"; do
        if [[ -n ${!variable:-} ]]; then printf '%s=%q\n' "$variable" "${!variable}"; fi
      done >"$parcel/environment"
    )
  fi
  on all 'rm -rf wmss'
  local copied=0
  run "${tpus[@]}" tpu-vm scp "${where[@]}" --worker=all --recurse "$parcel" "$name:" || copied=$?
  run rm -f "$parcel/environment"
  if ((copied != 0)); then return "$copied"; fi
  if [[ -n ${WMSS_SETUP:-} ]]; then on all "$WMSS_SETUP"; fi
  on all "bash wmss/tpu_pod.sh host install ${WMSS_PYTHON:-3.12} ${WMSS_EXTRAS:-tpu,data,tracking}"
}

start() {
  local line
  printf -v line ' %q' "$@"
  on all "bash wmss/tpu_pod.sh host start$line"
}

wait_for_end() { # returns the command's exit code; 75 too if the slice was taken away
  local states state failed_at="" code
  while true; do
    if states=$(on all 'bash wmss/tpu_pod.sh host state'); then
      if [[ -n $dry_run ]]; then return 0; fi
      mapfile -t states < <(sed -n 's/^state: //p' <<<"$states")
      if [[ " ${states[*]} " != *" running "* ]]; then break; fi
      if [[ "${states[*]}" =~ [1-9]|lost ]]; then # some host has failed, the others run on
        failed_at=${failed_at:-$SECONDS}
        if ((SECONDS - failed_at >= grace)); then on all 'bash wmss/tpu_pod.sh host kill' || true; fi
      fi
    else
      state=$(slice_state)
      if ! is_there "$state" && [[ $state != UNKNOWN ]]; then
        say "the slice is ${state:-gone}"
        return 75
      fi
      say "no connection to the hosts; the slice is $state"
    fi
    sleep "$poll"
  done
  say "the hosts ended with ${states[*]:-nothing}"
  code=0
  for state in "${states[@]}"; do # a mistake before a crash before "start me again" before done
    case $state in
      2) return 2 ;;
      75 | lost) ((code != 0)) || code=75 ;;
      0) ;;
      *) code=1 ;;
    esac
  done
  return "$code"
}

up() {
  local self=(launch/tpu_pod.sh) tries code state
  if [[ -n $dry_run ]]; then self+=(--dry-run); fi
  for ((tries = 0; tries <= ${WMSS_MAX_RESTARTS:-100}; tries++)); do
    code=0
    once "$@" || code=$?
    if ((code != 0 && code != 2 && code != 75)); then # a crash of its own, or because the slice was going away?
      state=$(slice_state)
      if ! is_there "$state" && [[ $state != UNKNOWN ]]; then code=75; fi
    fi
    if ((code != 75)); then break; fi
    say "saved or preempted: again"
  done
  if [[ ${WMSS_DELETE:-0} == 1 && $code != 75 ]]; then
    delete
  else
    say "the slice is still there and costs: launch/tpu_pod.sh delete"
  fi
  return "$code"
}

once() { # every step a process of its own, because bash ignores `set -e` in functions whose exit code is looked at
  state=$(slice_state)
  if ! is_there "$state"; then
    if [[ $state == UNKNOWN ]]; then return 1; fi
    if [[ -n $state ]]; then "${self[@]}" delete || return; fi # a preempted slice does not come back by itself
    "${self[@]}" create || return
    "${self[@]}" install || return
  elif ! on all 'test -x wmss/venv/bin/wmss'; then
    "${self[@]}" install || return
  fi
  "${self[@]}" run "$@"
}

read -ra forward <<<"${WMSS_FORWARD:-HF_TOKEN WANDB_API_KEY}"
verb=${1:-}
shift || true
case $verb in
  up | run) if [[ $# -eq 0 ]]; then verb=usage; fi ;;
esac
case $verb in
  create | install | delete) "$verb" ;;
  up) up "$@" ;;
  run) start "$@" && wait_for_end ;;
  wait) wait_for_end ;;
  logs) on "${WMSS_WORKER:-0}" 'tail -n 100 -F wmss/log' ;;
  stop) on all 'bash wmss/tpu_pod.sh host stop' ;;
  status)
    slice_state
    on all 'bash wmss/tpu_pod.sh host state'
    ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac
