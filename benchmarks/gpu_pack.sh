#!/usr/bin/env bash
# Packs what a GPU machine without a package index needs: benchmarks/gpu_pack.sh [FOLDER]
#
# FOLDER (.carry, which git ignores) gets
#   wheels/      wheels of PACKAGES below 5 MiB, for Python PYTHON_VERSION: name it in `carry` of the first call
#   piece-00/ …  CIFAR-10 as lossless WebP atlases (of EBJDAT_DATA), larger wheels and those of LARGE, as one archive cut into pieces of
#                PIECE MiB (what the checkout leaves of a call's 64): one a call
# and PACKED, with sizes and sha256. What an earlier run packed there is removed; a folder without PACKED that is not empty is refused.
# What to do on the machine is printed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.carry}
python=${PYTHON:-.venv/bin/python}
version=${PYTHON_VERSION:-3.12}
packages=${PACKAGES-httpx2 httpcore2 truststore idna anyio sniffio h11 pyautoattack}
large=${LARGE-}
room=64 # MiB that one call takes in, the checkout with it
tree=$(git ls-files -z --cached --others --exclude-standard | { xargs -0 du -cb -- 2>/dev/null || true; } | tail -n 1 | cut -f 1)  # files deleted but not committed are not there
piece=${PIECE:-$((room - 4 - tree / 1048576))}
case $piece in *[!0-9]*) [ -z "${PIECE-}" ] || { echo "gpu_pack: PIECE must be a number of MiB, not $PIECE" >&2; exit 1; } ;; esac
[ "$piece" -ge 1 ] || { echo "gpu_pack: the checkout leaves no room in a call: set PIECE" >&2; exit 1; }
git check-ignore -q "$folder/x" || { echo "gpu_pack: git does not ignore $folder: name a folder that it ignores" >&2; exit 1; }
if [ -e "$folder" ] && [ ! -f "$folder/PACKED" ] && [ -n "$(ls -A "$folder")" ]; then
  echo "gpu_pack: $folder holds what was not packed here: name another folder, or empty it" >&2
  exit 1
fi
command -v "$python" > /dev/null || { echo "gpu_pack: there is no $python: name an interpreter with PYTHON=" >&2; exit 1; }
rm -rf "$folder"/wheels "$folder"/archive "$folder"/archive.tar "$folder"/part.* "$folder"/piece-*
mkdir -p "$folder/wheels" "$folder/archive/wheels"
: > "$folder/PACKED"  # so that a run that is cut off can be made again

download() {  # into, packages: wheels for the other machine's Python, without what they depend on
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --abi "cp${version/./}" --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform any -d "$1" "${@:2}"
}
# shellcheck disable=SC2086  # lists of words
[ -z "$packages" ] || download "$folder/wheels" $packages
# shellcheck disable=SC2086
[ -z "$large" ] || download "$folder/archive/wheels" $large
find "$folder/wheels" -size +5M -exec mv {} "$folder/archive/wheels/" \;

"$python" - "$folder/archive" <<'PYTHON'
"""Writes CIFAR-10 as atlases, losslessly, where it is here in any form that training reads."""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.archives import CIFAR10_BATCHES, cifar10
from training.data.datasets import data_root

COLUMNS, BATCH = 100, 10_000
root, out = data_root(), Path(sys.argv[1]) / "atlas"
if not any((root / name).exists() for name in ("cifar-10-batches-py", "atlas", "cifar10")):
    print(f"gpu_pack: no CIFAR-10 in {root}, so none is packed: python -c 'from training.data.datasets import load; load(\"cifar10\")'")
    sys.exit()
_, train, test = cifar10(root)
names = [name for name in CIFAR10_BATCHES if name != "test_batch"]
batches = {name: (train.image[i : i + BATCH], train.label[i : i + BATCH]) for name, i in zip(names, range(0, len(train), BATCH), strict=True)}
batches["test_batch"] = (test.image, test.label)
out.mkdir(parents=True)
for name, (image, _) in batches.items():
    tiles = image.reshape(-1, COLUMNS, 32, 32, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(np.ascontiguousarray(tiles).reshape(-1, COLUMNS * 32, 3)).save(out / f"{name}.webp", lossless=True, method=0)
(out / "labels.json").write_text(json.dumps({name: label.tolist() for name, (_, label) in batches.items()}), encoding="utf-8")
PYTHON

tar -C "$folder/archive" -cf "$folder/archive.tar" .
sum=$(sha256sum "$folder/archive.tar" | cut -d' ' -f1)
split -b "${piece}M" -d "$folder/archive.tar" "$folder/part."
for part in "$folder"/part.*; do
  mkdir "$folder/piece-${part##*.}"
  mv "$part" "$folder/piece-${part##*.}/"
done
rm -r "$folder/archive" "$folder/archive.tar"
{
  du -sh --apparent-size "$folder"/wheels "$folder"/piece-*
  echo "$sum  archive.tar"
} | tee "$folder/PACKED"
cat <<TEXT
there, wheels first:   python3 -m pip install --no-index --no-deps $folder/wheels/*.whl && make gpu-check PYTHON=python3 OUT="\$OUT"
then a piece a call:   mkdir -p ~/packed && cp $folder/piece-*/part.* ~/packed/
after the last:        cat ~/packed/part.* > ~/packed/archive.tar && echo "$sum  \$HOME/packed/archive.tar" | sha256sum -c && mkdir -p ~/data && tar -xf ~/packed/archive.tar -C ~/data && python3 -m pip install --no-index --no-deps ~/data/wheels/*.whl
                       export EBJDAT_DATA=~/data
TEXT
