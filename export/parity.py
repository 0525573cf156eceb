#!/usr/bin/env python3
"""Compare a bundle's graphs with torch: `python export/parity.py BUNDLE`. The gate of every export.

Logits, energies and the score must agree to 1e-4 of the largest value at batches 1, 3 and 32, on the self-test's real
images, on chain samples drawn from them, and on images given with --images (a folder).
"""

import sys
from pathlib import Path

import numpy as np
import torch

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.decoding.judge import accepted
from ebjdat_serve.engines import Floats
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.exporting.parity import check
from ebjdat_serve.listing import list_images, printable
from ebjdat_serve.pixels import decode, to_unit

__all__ = ["check"]


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
