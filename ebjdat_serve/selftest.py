"""The self-test: a few images with the source's outputs (torch's), which servers and exports are checked against."""

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, Engine, EngineKind, Precision, load_engine, output_names
from ebjdat_serve.errors import BundleError
from ebjdat_serve.sgld import Chains, Prior, Sampler

TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1, "int8": 1e-1}
TOLERANCE = TOLERANCES["fp32"]
ROUNDING = "score_rounding"
"""Tensor of a self-test: how far the fp32 score of an imported network is from that in double precision (exporting/reference.py)."""
ROUNDINGS, KINKED = 8.0, 0.2
"""How many of these the scores of engines may differ by, and the most that it may come to; a wrong graph is off by about 1."""
PROBE = Sampler(steps=2, step_size=0.25, grad_clip=2.0, noise_std=0.005)
"""The sampler of the Langevin steps that engines are compared on."""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max|found - expected| / max|expected|; infinite for a wrong shape or values that are not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


FUNCTIONS = ("classify", "score", "step")
GIVEN = {"score": ("score", "joint_energy"), "step": ("moved",)}
"""What the self-test compares of each function but classify, whose outputs ``output_names`` tells."""


def compare(
    engine: Engine, image: np.ndarray, label: np.ndarray, expected: Mapping[str, np.ndarray], functions: Sequence[str] = FUNCTIONS
) -> dict[str, float]:
    """Return the relative error of each output of an engine, by name; ``expected`` may have more."""
    found = outputs(engine, image, label, functions)
    if "probabilities" in expected:
        found["probabilities"] = np.exp(found.pop("logits"))
    return {name: relative_error(value, expected[name]) for name, value in found.items()}


def outputs(
    engine: Engine, image: np.ndarray, label: np.ndarray, functions: Sequence[str] = FUNCTIONS, at_once: int = 2**16
) -> dict[str, np.ndarray]:
    """Return every output of an engine's ``functions`` on ``image`` and ``label``, and the images after two Langevin steps.

    ``at_once`` images are given at a time. What a model gives that gives probabilities are their logs, as ``logits``.
    """
    chains = Chains.at(image, PROBE, label, seed=0)
    found: list[dict[str, np.ndarray]] = []
    for part in (slice(start, start + at_once) for start in range(0, len(image), at_once)):
        row: dict[str, np.ndarray] = {}
        if "classify" in functions:
            row |= {name: value for name, value in engine.classify(image[part])._asdict().items() if value is not None}
        if "score" in functions:
            row["score"], row["joint_energy"] = engine.score(image[part], label[part])
        if "step" in functions:
            row["moved"] = engine.advance(chains.rows(part), PROBE.steps).image
        found.append(row)
    return {name: np.concatenate([row[name] for row in found]) for name in found[0]}


def replay(bundle: Bundle, kind: EngineKind = "onnx", device: Device = "cpu", precision: Precision = "fp32") -> dict[str, float]:
    """Return the relative error of each output; raise BundleError when one is beyond the tolerance of its precision."""
    return verify(bundle, load_engine(bundle, kind, device, 1, precision))


def verify(bundle: Bundle, engine: Engine, functions: Sequence[str] = FUNCTIONS) -> dict[str, float]:
    """Replay the self-test on an open engine, for some of its functions."""
    m = bundle.manifest
    try:
        expected = load_file(bundle.path / "selftest.safetensors")
        prior = Prior.load(bundle.path / "prior.safetensors") if "step" in bundle.functions else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(f"{bundle.path}: selftest.safetensors or prior.safetensors cannot be read: {error}") from error
    functions = [name for name in functions if name in bundle.functions]
    wanted_names = {"image", *(output_names(m) if "classify" in functions else [])}
    for function in set(functions) & set(GIVEN):
        wanted_names |= {"label", *GIVEN[function]}
    if missing := wanted_names - set(expected):
        made = "the self-test is not of this version; python export/to_onnx.py BUNDLE, or the import, writes it again"
        raise BundleError(f"{bundle.path}: {made} ({', '.join(sorted(missing))} missing)")
    size, classes = (3, m.input.height, m.input.width), len(m.labels)
    shapes = [expected["image"].shape[1:]]
    wanted: list[tuple[int, ...]] = [size]
    if "classify" in functions:
        shapes.append(expected[m.output].shape[1:])
        wanted.append((classes,))
    if shapes != wanted or not (prior is None or prior.of(m.drawn, *size[1:])):
        raise BundleError(f"{bundle.path}: self-test failed, labels, image size, prior and graphs are not from one model")
    return _compared(bundle, engine, functions, expected)


def verify_step(bundle: Bundle, engine: Engine) -> None:
    """Replay the self-test of the step graph of a bundle that has no prior yet; raise BundleError where it fails."""
    file = bundle.path / "selftest.safetensors"
    try:
        expected = load_file(file)
    except SafetensorError as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
    if missing := {"image", "label", *GIVEN["step"]} - set(expected):
        raise BundleError(f"{file} does not test steps ({', '.join(sorted(missing))} missing): import it again")
    _compared(bundle, engine, ("step",), expected)


def _compared(bundle: Bundle, engine: Engine, functions: Sequence[str], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the relative error of each output; raise BundleError when one is beyond its limit."""
    nobody = np.full(len(expected["image"]), -1, np.int64)  # a bundle that only classifies may leave labels out
    differences = compare(engine, expected["image"], expected.get("label", nobody), expected, functions)
    limits = dict.fromkeys(differences, TOLERANCES[engine.precision])
    if kinks := float(np.max(expected.get(ROUNDING, np.zeros(1)), initial=0.0)):
        off = min(ROUNDINGS * kinks, KINKED)
        limits["score"] = max(TOLERANCES[engine.precision], off)
        # the first step takes a score that may be off by that, of the largest value; the next begin elsewhere, across other kinks
        largest = min(PROBE.grad_clip, float(np.abs(expected.get("score", np.zeros(1))).max()))
        apart = off + (PROBE.steps - 1) * min(ROUNDINGS * off, KINKED)
        limits["moved"] = TOLERANCES[engine.precision] + PROBE.step_size * apart * largest
    for name, value in differences.items():
        if not value <= limits[name]:
            raise BundleError(
                f"{bundle.path}: self-test failed, {name} is off by {value:.1e} (limit {limits[name]:.0e}): "
                "these graphs and weights do not belong together"
            )
    return differences
