"""Eight images, their labels and what torch said of them: how a server without torch checks itself, and export's gate."""

import numpy as np
from safetensors.numpy import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Engine, EngineKind, load_engine
from ebjdat_serve.errors import BundleError

TOLERANCE = 1e-4


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max|found - expected| / max|expected|; infinite when something is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(engine: Engine, image: np.ndarray, label: np.ndarray, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the worst relative difference of logits, energy, score and joint energy from ``expected``."""
    logits, energy = engine.classify(image)
    score, joint_energy = engine.score(image, label)
    found = {"logits": logits, "energy": energy, "score": score, "joint_energy": joint_energy}
    return {name: worst(value, expected[name]) for name, value in found.items()}


def replay(bundle: Bundle, kind: EngineKind = "onnx") -> dict[str, float]:
    """Return the worst difference by output; raise BundleError when one is beyond 1e-4 of the largest value."""
    expected = load_file(bundle.path / "selftest.safetensors")
    differences = compare(load_engine(bundle, kind, "cpu"), expected["image"], expected["label"], expected)
    for name, value in differences.items():
        if not value <= TOLERANCE:
            raise BundleError(
                f"{bundle.path}: self-test failed, {name} is off by {value:.1e} (limit {TOLERANCE:.0e}): "
                "these graphs and weights do not belong together"
            )
    return differences
