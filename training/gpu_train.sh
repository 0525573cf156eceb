#!/usr/bin/env bash
# On a machine with a GPU: training/gpu_train.sh [PRESET] [OPTION OF train.py ...], as training/gpu_train.sh cifar10-full --max-minutes 9
#
# Checks the GPU first (make gpu-check; its status and its report end this when a step fails), once a run. Then trains, only: the run is
# named after the preset, saves every minute, and the same command goes on with it. Training needs torch, NumPy, Pillow and safetensors;
# export, calibration and evaluation of the finished run, here or on another machine: training/train.py PRESET --run gpu-PRESET --resume.
# PYTHON names the interpreter (.venv/bin/python, or python3), CHECKED=1 skips the check, which takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=cifar10-full
case ${1-} in '' | -*) ;; *) preset=$1; shift ;; esac
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x "$python" ] || python=python3
command -v "$python" > /dev/null || { echo "gpu_train: there is no $python: name an interpreter with PYTHON=" >&2; exit 1; }
runs=${EBJDAT_RUNS:-$HOME/.cache/ebjdat_serve/runs}
run=gpu-$preset
mkdir -p "$runs/$run"
if [ -z "${CHECKED-}" ] && [ ! -f "$runs/$run/gpu-checked" ]; then
  make gpu-check PYTHON="$python" OUT="$runs/$run/gpu-check"
  touch "$runs/$run/gpu-checked"
fi
resume=()
[ ! -f "$runs/$run/config.json" ] || resume=(--resume)
PYTHONPATH=. exec "$python" training/train.py "$preset" --run "$run" --only-train "${resume[@]}" "$@"
