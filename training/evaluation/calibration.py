"""Accuracy and calibration on clean, corrupted and re-collected images: likelihood, Brier score, and ECE beside its floor."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.calibrating import fit_temperature
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Labels
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import images_name
from training.data.datasets import data_root
from training.errors import DataError
from training.evaluation.attacks import Predict
from training.evaluation.context import Context, unit
from training.evaluation.metrics import (
    brier,
    calibration_floor,
    expected_calibration_error,
    mean_interval,
    negative_log_likelihood,
    reliability,
)
from training.evaluation.rows import estimate, number
from training.evaluation.shifts import CORRUPTIONS, corrupted

SEVERITIES = (1, 3, 5)
SEEN = 0.1
"""The most of the test images that may share their energy with one of the calibration's, by chance."""
BINS, DRAWS = 15, 100
"""Bins of the calibration error, and draws of its floor."""


def clean_rows(c: Context) -> Iterator[Row]:
    """Yield clean accuracy and the mean and standard deviation of the energies."""
    image, label = c.test(c.suite.test)
    found = c.look(c.where, Predict(gradient=True), image, label)
    logits = found["logits"].astype(np.float64)
    energy = -np.logaddexp.reduce(logits, axis=1)
    if energy.std() < 1e-4 * max(1.0, float(np.abs(logits).max())):
        c.say("E(x) is the same for every image: the model returns log-probabilities, not logits, and its energy figures are meaningless")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1.0, atol=1e-4):
        c.say("the model returns probabilities, not logits: cross-entropy and energies are of their softmax, and its gradients are small")
    if c.bundle is not None and c.bundle.manifest.imported and (known := shared_energies(c.bundle, energy)) > SEEN:
        c.say(f"{known:.0%} of the test images have the energy of a calibration image: were they calibrated on, too few are flagged")
    yield c.share("accuracy_clean", logits.argmax(axis=1) == label, c.where, c.subject.weights)
    yield estimate("energy_mean", energy.mean(), mean_interval(energy), len(label), c.where, c.subject.graph)
    yield number("energy_sd", energy.std(), len(label), c.where, c.subject.graph)


def shared_energies(bundle: Bundle, energy: np.ndarray) -> float:
    """Return the share of energies (N,) that an image of the bundle's calibration has, too: nothing else tells that it is the same."""
    known = np.asarray(bundle.calibration().energies if bundle.calibrated else [])
    return float(np.isclose(energy[:, None], known, rtol=2e-6, atol=0.0).any(axis=1).mean())


def calibration_rows(c: Context) -> Iterator[Row]:
    """Yield the calibration of p(y|x) at temperature 1 and at the one fitted on the selection split, on clean and corrupted images."""
    image, label = c.test(c.suite.test)
    (held_out,) = c.ledger.run("temperature", [(Predict(), *unit(c.data.selection))])
    stored = c.bundle.calibration() if c.bundle is not None and "calibration.json" in c.bundle.manifest.files else None
    temperature = stored.temperature if stored else fit_temperature(held_out["logits"], c.data.selection.label)
    n, of = len(c.data.selection), c.subject.graph
    yield number("temperature", temperature, n, Images(dataset=c.data.name, split="selection"), of)
    (found,) = c.ledger.run("calibration", [(Predict(), image, label)])
    yield from quality(c, [(found["logits"], label)], c.where, {"1": 1.0, "fitted": temperature})
    if temperature != 1.0:
        c.drawings["reliability"] = {
            name: np.asarray(reliability(probabilities(found["logits"], t), label)) for name, t in (("before", 1.0), ("after", temperature))
        }
    severities: dict[Images, list[tuple[np.ndarray, Labels]]] = {}
    for images, pixels, labels in shifted_sets(c):
        (found,) = c.ledger.run(images_name(images), [(Predict(), to_unit(pixels), labels)])
        yield c.share("accuracy_corrupted", found["logits"].argmax(axis=1) == labels, images, of)
        severities.setdefault(replace(images, corruption=None), []).append((found["logits"], labels))
    for severity, parts in severities.items():
        every = replace(severity, kinds=len(parts)) if len(parts) > 1 else severity
        if len(parts) > 1:  # all kinds corrupt the same images, so an interval is over images
            right = np.mean([logits.argmax(axis=1) == labels for logits, labels in parts], axis=0)
            yield estimate("accuracy_corrupted_mean", right.mean(), mean_interval(right), len(right), every, of)
        yield from quality(c, parts, every, {"fitted": temperature})


def quality(c: Context, parts: list[tuple[np.ndarray, Labels]], images: Images, temperatures: dict[str, float]) -> Iterator[Row]:
    """Yield likelihood, Brier score, ECE and the ECE of a calibrated model at this n; ``parts`` are of the same images."""
    for name, temperature in temperatures.items():
        of, n = c.subject.graph, len(parts[0][1])
        each = [(probabilities(logits.astype(np.float32), temperature), label) for logits, label in parts]
        for metric, score in (("nll", negative_log_likelihood), ("brier", brier)):
            values = np.mean([score(p, label) for p, label in each], axis=0)
            yield estimate(metric, values.mean(), mean_interval(values), n, images, of, temperature=name)
        p, label = np.concatenate([p for p, _ in each]), np.concatenate([label for _, label in each])
        metric = "ece_uncalibrated" if name == "1" else "ece"
        yield number(metric, expected_calibration_error(p, label, BINS), n, images, of, temperature=name, bins=BINS)
        floor = calibration_floor(p, BINS, DRAWS)
        yield number(f"{metric}_floor", floor, n, images, of, temperature=name, bins=BINS, draws=DRAWS)


def shifted_sets(c: Context) -> Iterator[tuple[Images, Pixels, Labels]]:
    """Yield (name, images, labels): test images corrupted by shifts.py, and CIFAR-10-C and CIFAR-10.1 if present."""
    some = c.data.test.first(c.suite.shifted)
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            images = replace(c.where, corruption=name, severity=severity, recipe="own")
            yield images, corrupted(some.image, name, severity), some.label
    if c.data.name != "cifar10":
        return
    for version in ("v6", "v4"):
        files = [data_root() / f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
        if all(file.is_file() for file in files):
            image, label = (np.load(file, allow_pickle=False) for file in files)
            if image.dtype != np.uint8 or image.shape[1:] != (32, 32, 3) or len(label) != len(image):
                raise DataError(f"{files[0]}: {image.dtype} {image.shape} is not CIFAR-10.1: uint8 (N, 32, 32, 3)")
            yield Images(dataset=f"CIFAR-10.1 {version}"), image, label.astype(np.int64)
    if not any((data_root() / f"cifar10.1_{version}_data.npy").is_file() for version in ("v6", "v4")):
        c.say("CIFAR-10.1: not measured, cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy are not in the data folder")
    folder = data_root() / "CIFAR-10-C"
    if not (folder / "labels.npy").is_file():
        c.say("CIFAR-10-C: not measured, CIFAR-10-C/labels.npy and its corruptions are not in the data folder")
        return
    for file in sorted(folder.glob("*.npy")):
        if file.stem == "labels":
            continue
        image, label = np.load(file, mmap_mode="r", allow_pickle=False), np.load(folder / "labels.npy", allow_pickle=False)
        for severity in SEVERITIES:
            rows = slice(10_000 * (severity - 1), 10_000 * (severity - 1) + c.suite.shifted)
            images = Images(dataset="CIFAR-10-C", corruption=file.stem, severity=severity)
            yield images, np.asarray(image[rows]), label[rows].astype(np.int64)
