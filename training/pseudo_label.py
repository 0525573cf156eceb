#!/usr/bin/env python3
"""Label generated images with a bundle's classifier: `python training/pseudo_label.py IMAGES BUNDLE -o extra.npz`.

IMAGES is an .npz with ``image`` or a folder of images. Images whose largest probability is below --least are left out. With any method,
`train.py --set extra=extra.npz extra_fraction=0.7` mixes the file into every labelled batch.
"""

from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines.eager import TorchEngine
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.pixels import to_unit
from training.data.datasets import load_images
from training.errors import DataError


def pseudo_label(source: str, bundle: Bundle, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, H, W, 3) uint8 whose p(y|x) reaches ``least``, and their most probable class (N,)."""
    image = load_images(source, bundle.manifest.input)
    logits = classify_in_chunks(TorchEngine(bundle, "cpu", 1), to_unit(image)).logits
    p = probabilities(logits, 1.0)
    sure = p.max(axis=1) >= least
    if not sure.any():
        raise DataError(f"none of {len(image)} images reaches a probability of {least}: lower --least")
    return image[sure], p.argmax(axis=1)[sure].astype(np.int64)


def main() -> None:
    """Write the labelled images."""
    parser = parser_of(__doc__)
    parser.add_argument("images")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("extra.npz"))
    parser.add_argument("--least", type=float, default=0.0, help="smallest probability of a kept image (%(default)s)")
    options = parser.parse_args()
    with command(parser):
        bundle = Bundle.load(options.bundle)
        image, label = pseudo_label(options.images, bundle, options.least)
        np.savez_compressed(options.output, image=image, label=label, names=np.asarray(bundle.manifest.labels))
        print(f"{len(label)} images, {np.bincount(label).tolist()} a class, in {options.output}")


if __name__ == "__main__":
    main()
