#!/usr/bin/env bash
# A whole recipe, from "is it installed?" to a checked model, each line to be read and to be run by itself.
#
#   launch/pipeline.sh [--cpu] [--dry-run] [KEY=VALUE ...]      (KEY=VALUE as `wmss run` takes them)
#   WMSS_DATA=DIR WMSS_TOPOLOGY=h100:1x1x8 launch/pipeline.sh   # the paper's recipe on 8 GPUs
#   WMSS_DATA=DIR launch/pipeline.sh --cpu                      # its twin for a laptop: a tiny model, 25 minutes
#
# From the environment (default):
#   WMSS_DATA (required)      directory of the recipe's data
#   WMSS_RECIPE (configs/paper_v2_qwen3_8b.yaml; with --cpu configs/mwp_cpu.yaml)
#   WMSS_WORK_DIR (runs/ and the recipe's name)      where everything is written; the same place goes on from there
#   WMSS_TOPOLOGY (none)      v5p:4x4x4, h100:1x1x8, ...: ends if it does not fit; needs the extra plan-tpu or plan-cuda
#   WMSS_LAUNCH (none)        words before the training command: "launch/local.sh 2" for two processes
#   WMSS_PYTHON (python3)     WMSS (wmss)      which ones
#   HF_TOKEN, WANDB_API_KEY   are read by the libraries that need them
#
# It ends at the first command that fails, with its exit code. SIGTERM and SIGINT reach that command as SIGTERM; when it
# has saved (75), the same line goes on from there.
set -euo pipefail

cpu="" dry_run="" overrides=()
for argument in "$@"; do
  case $argument in
    --cpu) cpu=1 ;;
    --dry-run) dry_run=1 ;;
    *=*) overrides+=("$argument") ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
  esac
done

recipe=${WMSS_RECIPE:-configs/paper_v2_qwen3_8b.yaml}
if [[ -n $cpu ]]; then
  recipe=${WMSS_RECIPE:-configs/mwp_cpu.yaml}
  export JAX_PLATFORMS=cpu
fi
work_dir=${WMSS_WORK_DIR:-runs/$(basename "$recipe" .yaml)}
data=${WMSS_DATA:?is the directory of the data}
settings=("data=$data" "work_dir=$work_dir" "${overrides[@]}")
python=${WMSS_PYTHON:-python3} wmss=${WMSS:-wmss}
read -ra launch <<<"${WMSS_LAUNCH:-}"

child="" signalled=""
trap 'signalled=1; if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM INT

step() { # prints a command and runs it; bash alone would keep a signal to itself until the command has ended
  printf '+'
  printf ' %q' "$@"
  echo
  if [[ -n $dry_run ]]; then return; fi
  if [[ -n $signalled ]]; then exit 75; fi # between two commands: nothing is lost
  "$@" &
  child=$!
  local code
  while true; do
    signalled="" code=0
    wait "$child" || code=$?
    if [[ -z $signalled ]]; then break; fi # else a signal ended the wait, not the command
  done
  child=""
  if ((code != 0)); then exit "$code"; fi
}

# 1. Is everything installed, and which devices does JAX see? (A process of its own: it lets go of them again.)
step "$python" -c "import jax, wmss_jax; print(jax.__version__, jax.devices())"

# 2. What will it train on? Three examples with their trained tokens marked, lengths, duplicates.
step "$wmss" inspect "$recipe" "${settings[@]}"

# 3. Will it fit? Compiles the joint step, the largest, for devices that need not be here; exit code 1 if it does not.
if [[ -n ${WMSS_TOPOLOGY:-} ]]; then step "$wmss" plan "$recipe" "${settings[@]}" --topology "$WMSS_TOPOLOGY"; fi

# 4. The method: (pretrain,) SFT, scores, curriculum, joint training, export, evaluation; a table at the end.
step "${launch[@]}" "$wmss" run "$recipe" "${settings[@]}"

# 5. Is the exported model whole? Names, shapes, dtypes and values, read back from its files.
step "$wmss" convert check "$work_dir/export"

# 6. The figures of the table once more, for machines; every prompt and answer is in eval/*.jsonl beside it.
step cat "$work_dir/summary.json"
