#!/usr/bin/env python3
"""Measure explanations next to plain AT and an undefended net, and draw examples: `python benchmarks/explanations.py [--json FILE]`.

Writes the tables of docs/explanations.md, its strip, and the rows they come from. `--directions` compares the gradients that a search may
climb, on 60 images (docs/decisions/0026); `--draw` only draws.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import placed
from ebjdat_serve import counterfactual, pixels
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.counterfactual import Norm, Searches, counterfactuals, length
from ebjdat_serve.cpus import cpus
from ebjdat_serve.engines import Differentiable, Floats, load_engine
from ebjdat_serve.rows import Row, first, parse_row, to_json
from ebjdat_serve.server.settings import SHIPPED
from training.data.datasets import load, read_atlas
from training.evaluate import evaluate, evaluate_module
from training.evaluation.context import SUITES
from training.evaluation.evaluated_model import load_weights
from training.evaluation.explanation import LIKELY, RANDOM, RUNNER_UP, SEARCHES

ROOT = Path(__file__).parent.parent
DOCUMENT, STRIP, MODELS = ROOT / "docs" / "explanations.md", ROOT / "docs" / "explanations.png", ROOT / "benchmarks" / "models"
ATLAS = ROOT / "tests" / "data" / "cifar10_test_500.webp"
SUBJECTS = {"bundled": SHIPPED, **{name: MODELS / name / "weights.safetensors" for name in ("pgd-at", "fgsm-rs", "standard")}}
"""The bundled model, two plain AT networks, and the undefended one; the last three are WRN-16-2."""
EXAMPLES = (
    (160, "dog", 0.0), (160, "dog", LIKELY),
    (225, "horse", LIKELY), (53, "truck", LIKELY), (356, "deer", LIKELY), (401, "airplane", LIKELY),
)  # fmt: skip
"""Image of the atlas, the class asked for and its probability; chosen by hand."""
SCALE = 3
Gradient = Any


def target_alone(engine: Differentiable, s: Searches) -> Floats:
    """Return DAT's gradient, of the target's logit."""
    return engine.score(s.image, s.target)[0]


def less_the_input(engine: Differentiable, s: Searches) -> Floats:
    """Return the gradient of the target's logit less that of the input's class."""
    return engine.score(s.image, s.target)[0] - engine.score(s.image, s.source)[0]


def log_probability(engine: Differentiable, s: Searches) -> Floats:
    """Return the gradient of log p(t|x) = E(x) - E(x, t)."""
    return engine.score(s.image, s.target)[0] - engine.score(s.image, np.full(len(s), -1))[0]


DIRECTIONS: dict[str, Gradient] = {
    "f_t": target_alone, "f_t - f_a, a the input's class": less_the_input, "log p(t)": log_probability,
    "f_t - f_r, r the strongest rival": counterfactual.gradient,
}  # fmt: skip


def measure(n: int, processes: int) -> list[dict[str, Any]]:
    """Return the rows of every subject."""
    data, suite, found = load("cifar10"), SUITES["quick"].at_most(n), []
    for name, path in SUBJECTS.items():
        if path == SHIPPED:
            rows = evaluate(Bundle.load(path), data, suite, parts=("explanation",), processes=processes).rows
        else:
            rows = evaluate_module(load_weights(path), data, suite=suite, parts=("explanation",), name=name, processes=processes)
        found += [{"name": f"{row.metric} {name}", "unit": "", "model": name, **to_json(row)} for row in rows if row.part == "explanation"]
    return found


def directions(n: int) -> list[dict[str, Any]]:
    """Return validity and distance by direction, of the same images, targets and balls."""
    image = pixels.to_unit(read_atlas(ATLAS, 32)[4::8][:n])
    engine, rows = load_engine(Bundle.load(SHIPPED), "onnx", "cpu", 1), []
    own = engine.classify(image)[0].argmax(axis=1)
    targets = {RUNNER_UP: None, RANDOM: (own + 1 + np.arange(n) % 9) % 10}
    balls: tuple[tuple[Norm, float], ...] = (("l2", 2.0), ("l2", 4.0), ("linf", 8 / 255), ("linf", 32 / 255))
    for target_name, target in targets.items():
        for norm, radius in balls if target_name == RUNNER_UP else balls[:2]:
            found = {name: climbed(engine, image, target, gradient, norm, radius) for name, gradient in DIRECTIONS.items()}
            every = np.all([s.found for s in found.values()], axis=0)
            for name, s in found.items():
                rows.append({
                    "name": f"{name}, {target_name}, {norm} {radius:.4g}", "unit": "share", "value": float(s.found.mean()), "n": n,
                    "distance_mean": float(length(s.best - image, s.linf)[every].mean()), "found_by_all": int(every.sum()),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def climbed(engine: Differentiable, image: Floats, target: Any, gradient: Gradient, norm: Norm, radius: float) -> Searches:
    """Return the searches that climb ``gradient``."""
    usual, counterfactual.gradient = counterfactual.gradient, gradient
    try:
        return counterfactuals(engine, image, target, norm=norm, radius=radius)
    finally:
        counterfactual.gradient = usual


def draw() -> list[str]:
    """Write the strip of examples, a row each: input, counterfactual, difference; return what it shows."""
    engine, labels, rows, said = load_engine(Bundle.load(SHIPPED), "onnx", "cpu", 1), Bundle.load(SHIPPED).manifest.labels, [], []
    temperature = Bundle.load(SHIPPED).calibration().temperature
    for index, to, least in EXAMPLES:
        image = read_atlas(ATLAS, 32)[index : index + 1]
        s = counterfactuals(
            engine, pixels.to_unit(image), np.array([labels.index(to)]), norm="l2", radius=4.0, least=least, temperature=temperature
        )
        changed = pixels.to_bytes(s.best)
        delta = changed.astype(np.float64) - image
        gain = 127 / max(1.0, np.abs(delta).max())
        rows.append(pixels.grid(np.concatenate([image, changed, np.rint(128 + gain * delta).astype(np.uint8)]), SCALE, columns=3))
        asked = f", probability {least:g} asked for" if least else ""
        name = f"{labels[int(s.source[0])]} to {labels[int(s.target[0])]}"
        said.append(f"{name}{asked}: {'' if s.found[0] else 'not found, '}l2 {length(s.best - s.origin, s.linf)[0]:.2f}")
    half = len(rows) // 2
    sheet = np.concatenate(
        [np.concatenate(rows[:half]), np.full((SCALE * 32 * half, 8, 3), 255, np.uint8), np.concatenate(rows[half:])], axis=1
    )
    text = [("Software", "ebjdat_serve"), ("Source", "AI-generated: counterfactuals of CIFAR-10 test images")]
    STRIP.write_bytes(pixels.encode_png(sheet, text, generated=True))
    return said


def document(text: str, rows: list[dict[str, Any]]) -> str:
    """Return ``text`` with the table of ``rows``."""
    return placed(text, "explanations", table({name: parsed(rows, name) for name in SUBJECTS}))


def parsed(rows: list[dict[str, Any]], model: str) -> list[Row]:
    """Return the rows of one model."""
    return [
        parse_row({key: value for key, value in row.items() if key not in ("name", "unit", "model")}, model)
        for row in rows
        if row["model"] == model
    ]


def table(models: dict[str, list[Row]]) -> str:
    """Return a line for each search and model."""
    lines = ["| class, ball | model | found | l1 | l2 | oracle agrees | before |", "|---|---|---|---|---|---|---|"]
    for target in (RUNNER_UP, RANDOM):
        for norm, least in SEARCHES:
            for model, rows in models.items():
                valid, l1, l2, oracle = (
                    first(rows, f"explanation_{name}", objective=target, norm=norm, probability=least or None)
                    for name in ("valid", "l1_median", "l2_median", "agreement_oracle")
                )
                assert valid
                ball = f"{target}, {norm}{f', p >= {least:g}' if least else ''}"
                cells = [
                    ball,
                    model,
                    share(valid),
                    *(f"{one.value:.3g}" if one else "" for one in (l1, l2)),
                    share(oracle) if oracle else "",
                ]
                before = f"{(oracle.observed or {})['before']:.2f}" if oracle else ""
                lines.append(f"| {' | '.join([*cells, before])} |")
    return "\n".join(lines)


def share(row: Row) -> str:
    """Return a proportion with its interval and n."""
    low, high = row.interval or (float("nan"),) * 2
    return f"{row.value:.2f} [{low:.2f}, {high:.2f}] of {row.n}"


def main() -> None:
    """Measure, draw and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "explanations.json")
    parser.add_argument("--n", type=int, default=60, help="test images of each search (%(default)s)")
    parser.add_argument("--processes", type=int, default=cpus())
    parser.add_argument("--directions", action="store_true", help="compare gradients, and nothing else")
    parser.add_argument("--draw", action="store_true", help="only draw the examples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.directions:
        write_json(options.json, directions(options.n))
        return
    print("\n".join(draw()))
    if options.draw:
        return
    rows = measure(options.n, options.processes)
    write_json(options.json, rows)
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
