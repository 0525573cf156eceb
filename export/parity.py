#!/usr/bin/env python3
"""Compare a bundle's graphs with torch: `python export/parity.py BUNDLE`. The gate of every export.

Logits, energies and the score must agree to 1e-4 of the largest value at batches 1, 3 and 32, on the self-test's real
images, on chain samples drawn from them, and on images given with --images (a folder).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.decoding.judge import accepted
from ebjdat_serve.engines import Engine, Floats
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.listing import list_images, printable
from ebjdat_serve.pixels import decode, to_unit
from ebjdat_serve.selftest import TOLERANCE, compare, outputs
from ebjdat_serve.sgld import Chains, Prior

BATCHES = (1, 3, 32)


def check(bundle: Bundle, real: Floats | None = None) -> dict[str, float]:
    """Return the relative error by output, batch and kind of image; raise EbjdatError when one is beyond 1e-4."""
    torch_engine, onnx_engine = TorchEngine(bundle, "cpu", torch.get_num_threads()), OnnxEngine(bundle, "cpu")
    if real is None:
        real = load_file(bundle.path / "selftest.safetensors")["image"]
    found: dict[str, float] = {}
    for kind, images in (("real", real), ("chain", chains(bundle, torch_engine, max(BATCHES)))):
        for batch in BATCHES:
            image = np.resize(images, (batch, *images.shape[1:]))
            label = (np.arange(batch, dtype=np.int64) % (len(bundle.manifest.labels) + 1)) - 1
            for name, value in compare(onnx_engine, image, label, outputs(torch_engine, image, label)).items():
                found[f"{name} batch {batch} {kind}"] = value
    bad = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if bad:
        raise EbjdatError(f"{bundle.path}: graphs differ from torch beyond {TOLERANCE:.0e}: {bad}")
    return found


def chains(bundle: Bundle, engine: Engine, n: int) -> Floats:
    """Return n chain samples (n, 3, H, W) drawn with the bundle's own sampler."""
    label = np.arange(n, dtype=np.int64) % len(bundle.manifest.labels)
    sampler = bundle.manifest.sampler
    return engine.advance(Chains.start(Prior.load(bundle.path / "prior.safetensors"), sampler, label, seed=0), sampler.steps).image


def read_images(bundle: Bundle, folder: Path) -> Floats:
    """Return the images in ``folder``, (N, 3, H, W) in [0,1], decoded as in the server."""
    listing = list_images(folder)
    if not listing.images:
        raise EbjdatError(f"{printable(folder)} holds no images ({', '.join(accepted())})")
    if said := listing.note():
        print(f"note: {printable(folder)}: {said}", file=sys.stderr)
    return to_unit(np.stack([decode(path.read_bytes(), bundle.manifest.input) for path in listing.images]))


def main() -> None:
    """Check the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, help="a folder of images to compare on, besides the self-test's")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    with command(parser):
        bundle = Bundle.draft(options.bundle)
        for name, value in check(bundle, read_images(bundle, options.images) if options.images else None).items():
            print(f"{name:32} {value:.1e}")


if __name__ == "__main__":
    main()
