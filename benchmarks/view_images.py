"""Image sets that benchmarks/views.py looks at: clean and handled splits, OOD sets, odd images, benign shifts, proxies."""

from collections.abc import Callable

import numpy as np

from ebjdat_serve.handling import handled
from ebjdat_serve.pixels import Pixels, to_bytes
from training.data.datasets import Dataset
from training.data.image_folders import spread
from training.evaluation.odd import odd_images
from training.evaluation.ood_sets import ODD_SETS, strange_images
from training.evaluation.shifts import SHIFTS, shifted

SEED = 0
TRAINING, TEST, ODD = 20_000, 2000, 500
BENIGN = {
    name: SHIFTS[name]
    for name in ("JPEG q75", "WebP q75", "grey", "resized up x7", "resized up x2", "resized down x0.75 and up", "brightness x1.15")
}

BLURRED = ("resized up x2", "resized down x0.75 and up")


def proxies(image: Pixels) -> dict[str, Pixels]:
    """Return OOD sets made of images (N, H, W, 3): for choosing between candidates without an OOD set."""
    noise = np.random.default_rng([SEED, 1])
    n, height, width, _ = image.shape
    tile = height // 4
    tiles = image.reshape(n, 4, tile, 4, width // 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 16, tile, width // 4, 3)
    mixed = np.stack([one[noise.permutation(16)] for one in tiles]).reshape(n, 4, 4, tile, width // 4, 3)
    other = np.roll(image, 1, axis=0)
    phase = np.exp(1j * np.angle(np.fft.fft2(noise.random((n, height, width)), axes=(1, 2))))[..., None]
    spectrum = np.fft.fft2(image.astype(np.float64), axes=(1, 2))
    mean = spectrum[:, :1, :1].copy()
    scrambled = spectrum * phase
    scrambled[:, :1, :1] = mean
    halves = image.copy()
    halves[:, :, width // 2 :] = other[:, :, width // 2 :]
    noisy = image + noise.normal(0, 32, image.shape)
    return {
        "turned by 90 degrees": np.ascontiguousarray(np.rot90(image, axes=(1, 2))),
        "inverted": 255 - image,
        "sixteen tiles shuffled": mixed.transpose(0, 1, 3, 2, 4, 5).reshape(image.shape),
        "means of two": ((image.astype(np.uint16) + other) // 2).astype(np.uint8),
        "halves of two": halves,
        "phases scrambled": np.rint(np.fft.ifft2(scrambled, axes=(1, 2)).real.clip(0, 255)).astype(np.uint8),
        "noise of sd 32": np.rint(noisy.clip(0, 255)).astype(np.uint8),
    }


def image_sets(data: Dataset, say: Callable[[str], None]) -> dict[str, Pixels]:
    """Return all sets by ROLE/NAME: train, selection and calibration, plain and handled; test; ood, odd, benign, proxy, handled."""
    height, width = data.size
    test, second = data.test.image[:TEST], data.selection.image[len(data.selection) // 2 :]
    parts = {"train": data.train.image[:TRAINING], "selection": data.selection.image, "calibration": data.calibration.image}
    sets = {f"clean/{name}": image for name, image in parts.items()} | {"clean/test": test}
    mixed = {"selection": data.selection.image, "calibration": data.calibration.image, "test": test}
    sets |= {f"handled/{name}": handled(image, seed) for seed, (name, image) in enumerate(mixed.items(), 1)}
    for name, image in strange_images(data, test[:1000], say):
        role = "odd" if name in ODD_SETS else "ood"
        sets[f"{role}/{name}"] = to_bytes(image[spread(len(image), TEST)])
    sets |= {"ood/test turned by 90 degrees": np.ascontiguousarray(np.rot90(test, axes=(1, 2))), "ood/test inverted": 255 - test}
    sets |= {f"odd/{name}": image for name, image in odd_images(height, width, ODD).items()}
    sets |= {f"benign/{name}": shifted(test, shift) for name, shift in BENIGN.items()}
    sets |= {f"proxy/{name}": image for name, image in proxies(second).items()}
    return sets | {f"benign selection/{name}": shifted(second, shift) for name, shift in BENIGN.items()}
