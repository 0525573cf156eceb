"""Eight images, their labels and what torch said of them: how a server without torch checks itself, and export's gate."""

from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, Engine, EngineKind, Precision, load_engine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.sgld import Chains, Prior, Sampler

TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 1e-1}
TOLERANCE = TOLERANCES["fp32"]
PROBE = Sampler(steps=2, step_size=0.25, grad_clip=2.0, noise_std=0.005)
"""The steps that every engine is compared on."""


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max|found - expected| / max|expected|; infinite when something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


FUNCTIONS = ("classify", "score", "step")


def compare(
    engine: Engine, image: np.ndarray, label: np.ndarray, expected: dict[str, np.ndarray], functions: Sequence[str] = FUNCTIONS
) -> dict[str, float]:
    """Return the worst relative difference of an engine's answers from ``expected``, by name."""
    found = answers(engine, image, label, functions)
    return {name: worst(value, expected[name]) for name, value in found.items()}


def answers(engine: Engine, image: np.ndarray, label: np.ndarray, functions: Sequence[str] = FUNCTIONS) -> dict[str, np.ndarray]:
    """Return all that an engine's ``functions`` say of ``image`` and ``label``: every output, and where two Langevin steps lead."""
    found: dict[str, np.ndarray] = {}
    if "classify" in functions:
        found["logits"], found["energy"] = engine.classify(image)
    if "score" in functions:
        found["score"], found["joint_energy"] = engine.score(image, label)
    if "step" in functions:
        found["moved"] = engine.advance(Chains.at(image, PROBE, label, seed=0), PROBE.steps).image
    return found


def replay(bundle: Bundle, kind: EngineKind = "onnx", device: Device = "cpu", precision: Precision = "fp32") -> dict[str, float]:
    """Return the worst difference by output; raise BundleError when one is beyond its precision's share of the largest value."""
    return verify(bundle, load_engine(bundle, kind, device, 1, precision))


def verify(bundle: Bundle, engine: Engine, functions: Sequence[str] = FUNCTIONS) -> dict[str, float]:
    """Do as ``replay`` with an engine that is open, for some of its functions."""
    tolerance, m = TOLERANCES[engine.precision], bundle.manifest
    try:
        expected = load_file(bundle.path / "selftest.safetensors")
        prior = Prior.load(bundle.path / "prior.safetensors")
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"{bundle.path}: selftest.safetensors or prior.safetensors cannot be read: {error}") from error
    if missing := {"image", "label", "logits", "energy", "score", "joint_energy", "moved"} - set(expected):
        made = "the self-test was made by an earlier version; python export/to_onnx.py BUNDLE makes it anew"
        raise BundleError(f"{bundle.path}: {made} ({', '.join(sorted(missing))} missing)")
    size, classes = (3, m.input.height, m.input.width), len(m.labels)
    if expected["logits"].shape[1:] != (classes,) or expected["image"].shape[1:] != size or prior.mean.shape != (classes, *size):
        raise BundleError(f"{bundle.path}: self-test failed, labels, image size, prior and graphs are not of one model")
    differences = compare(engine, expected["image"], expected["label"], expected, functions)
    for name, value in differences.items():
        if not value <= tolerance:
            raise BundleError(
                f"{bundle.path}: self-test failed, {name} is off by {value:.1e} (limit {tolerance:.0e}): "
                "these graphs and weights do not belong together"
            )
    return differences
