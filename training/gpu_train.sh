#!/usr/bin/env bash
# On a machine with a GPU: training/gpu_train.sh [PRESET] [--max-minutes N] [OPTION OF train.py ...]; cifar10-full without a PRESET.
#
# Checks the GPU first (make gpu-check; its status and its report end this when a step fails), once a run. Then trains, only: the run is
# named after the preset and saves every minute, and the same command goes on with it. After N minutes, the check's included, it saves and
# ends with status 124; no stage gets shorter by that, as by --max-minutes of train.py. Training needs torch, NumPy, Pillow and safetensors;
# export, calibration and evaluation of the finished run, here or on another machine: training/train.py PRESET --run gpu-PRESET --resume.
# PYTHON names the interpreter (.venv/bin/python, or python3), CHECKED=1 skips the check, which takes up to nine minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=cifar10-full minutes='' options=()
case ${1-} in '' | -*) ;; *) preset=$1; shift ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --max-minutes) minutes=${2-none}; [ $# -eq 1 ] || shift ;;
    --max-minutes=*) minutes=${1#*=} ;;
    --run | --run=* | --name | --name=* | --resume) echo "gpu_train: it names its run gpu-PRESET, and resumes it by itself: leave $1 out" >&2; exit 2 ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ $minutes =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)?$ ]] || { echo "gpu_train: --max-minutes takes a number, not $minutes" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x "$python" ] || python=python3
command -v "$python" > /dev/null || { echo "gpu_train: there is no $python: name an interpreter with PYTHON=" >&2; exit 1; }
PYTHONPATH=. "$python" training/train.py "$preset" --help > /dev/null  # a preset that is none is told before the check, which takes minutes
runs=${EBJDAT_RUNS:-$HOME/.cache/ebjdat_serve/runs}
run=gpu-$preset
mkdir -p "$runs/$run"
if [ -z "${CHECKED-}" ] && [ ! -f "$runs/$run/gpu-checked" ]; then
  make gpu-check PYTHON="$python" OUT="$runs/$run/gpu-check"
  touch "$runs/$run/gpu-checked"
fi
[ ! -f "$runs/$run/config.json" ] || options+=(--resume)
limit=()
if [ -n "$minutes" ]; then  # SIGTERM ends training after the current step, with its state saved
  seconds=$("$python" -c 'import sys; print(max(1.0, 60 * float(sys.argv[1]) - float(sys.argv[2])))' "$minutes" "$SECONDS")
  limit=(timeout --foreground --kill-after=60 "$seconds")
fi
status=0
PYTHONPATH=. "${limit[@]}" "$python" training/train.py "$preset" --run "$run" --only-train "${options[@]}" || status=$?
[ $status != 124 ] || echo "gpu_train: $minutes minutes are over, the run is saved: the same command goes on with it" >&2
exit $status
