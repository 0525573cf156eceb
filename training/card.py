#!/usr/bin/env python3
"""The model card and its pictures, generated from the bundle's JSON: nothing in it is typed by hand.

`python training/card.py BUNDLE` writes the card again; `--readme README.md` also writes the figures between its markers.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle, read_json, write_json
from ebjdat_serve.card import table
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.generation import generate
from ebjdat_serve.sgld import Prior
from training.evaluation.rows import ball_of

Row = dict[str, Any]
MARKERS = ("<!-- figures -->", "<!-- /figures -->")
LICENCES = {
    "cifar10": "Weights: Apache-2.0. CIFAR-10 (Krizhevsky 2009) states no licence; its use here follows research custom. SVHN, non-commercial, "
    "is used for evaluation only.",
    "cifar100": "Weights: Apache-2.0. CIFAR-100 (Krizhevsky 2009) states no licence; its use here follows research custom.",
    "svhn": "Weights of a model trained on SVHN (Netzer et al. 2011), which is for non-commercial use only.",
    "digits": "Weights: Apache-2.0. Digits: UCI, Alpaydin and Kaynak 1998, as scikit-learn ships them (CC BY 4.0).",
}
IN_README = (
    "accuracy_clean",
    "accuracy_pgd20",
    "accuracy_autoattack",
    "energy_gap_adv_over_sd",
    "frechet_resnet20",
    "class_agreement_resnet20",
    "ece",
    "flag_rate_clean",
    "flag_rate_clean_in_interval",
    "auroc_energy",
    "flag_power",
)


def write_card(bundle: Bundle, rows: list[Row], baseline: list[Row], arrays: dict[str, Any]) -> list[str]:
    """Write README.md, samples.png, landscape.png and, when given, baseline.json; return their names.

    Raises BundleError for figures that were measured on other files than the bundle's.
    """
    refuse_stale(bundle, rows)
    write_samples(bundle)
    names = ["README.md", "samples.png"]
    if write_landscape(bundle, arrays) or (bundle.path / "landscape.png").is_file():
        names.append("landscape.png")
    if baseline:
        write_json(bundle.path / "baseline.json", baseline)
        names.append("baseline.json")
    (bundle.path / "README.md").write_text(card(bundle, rows, baseline))
    return names


def refuse_stale(bundle: Bundle, rows: list[Row]) -> None:
    """Raise BundleError that names the first figure that is not of the bundle's files."""
    stale = [row for row in rows if not bundle.holds(row["of"])]
    if stale:
        raise BundleError(
            f"{bundle.path / 'metrics.json'} is stale: {len(stale)} figures, {stale[0]['metric']} first, were measured on {stale[0]['of'][:12]}, "
            f"which the bundle does not hold; run python training/evaluate.py {bundle.path}"
        )


def write_samples(bundle: Bundle) -> None:
    """Write samples.png: one column a class, seeds 0 upwards, none chosen."""
    classes = len(bundle.manifest.labels)
    label = np.tile(np.arange(classes, dtype=np.int64), 6)
    samples = generate(OnnxEngine(bundle, "cpu"), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler, label, seed=0)
    (bundle.path / "samples.png").write_bytes(pixels.encode_png(pixels.grid(samples.image, 3, columns=classes), generated=True))


def write_landscape(bundle: Bundle, arrays: dict[str, Any]) -> bool:
    """Write landscape.png: E(x) and E(x, y) of clean, adversarial, drawn and strange images; False when not measured."""
    if "clean" not in arrays:
        return False
    from training.evaluation.figures import landscape, png  # matplotlib takes a second

    eps = ball_of(bundle.manifest.provenance.dataset).linf
    (bundle.path / "landscape.png").write_bytes(png(landscape(arrays, eps), 110))
    return True


def card(bundle: Bundle, rows: list[Row], baseline: list[Row]) -> str:
    """Return the model card."""
    m, p = bundle.manifest, bundle.manifest.provenance
    poor = [f"{row['dataset']} ({row['value']:.3f})" for row in rows if row["metric"] == "auroc_energy" and row["value"] < 0.5]
    weak = f"\nThe energy is **worse than chance** (AUROC below 0.5) on: {'; '.join(poor)}.\n" if poor else ""
    warm = p.configuration.get("warm_start")
    beside = f"The warm start is `{warm}`, the network that this model was continued from, evaluated identically.\n" if warm else ""
    aligned = (
        "training aligns the energies of clean and\nadversarial images, so the energy" if method_kind(bundle) == "EbJdat" else "the energy"
    )
    return f"""# {m.name}@{m.version}

{m.architecture.family} {m.architecture.depth}-{m.architecture.width} on {p.dataset}, {m.input.height} x {m.input.width} pixels: {", ".join(m.labels)}.
Trained as `{p.preset}` by method {method_kind(bundle)} (its configuration is in bundle.json), seed {p.seed}, git {short(p.git)}, begun {p.started}:
{p.steps} of {p.planned_steps} planned steps, rolled back for divergence {p.rollbacks} times. Data sha256 {p.data_sha256[:16]}.

![samples: one column a class, seeds in order, none chosen](samples.png)

Generation is short-run conditional sampling ({m.sampler.steps} steps of {m.sampler.step_size}, gradient clip {m.sampler.grad_clip}, noise {m.sampler.noise_std}) from a
class Gaussian; it is not an exact draw from p(x|y).

## Measured

{beside}Robust accuracies are in pixels of [0,1]; the published EB-JDAT code works in [-1,1], so its 8/255 is 4/255 here.

{table(rows, baseline)}

![energies of clean (blue) and PGD-20 (red) test images](landscape.png)
{weak}
## What the flag sees

`suspicious` means p < alpha, with p = (1 + #(clean calibration energies >= E(x))) / (n + 1). It bounds false alarms on data like
the calibration set, on average over calibration draws; given this one set the rate is Beta-distributed, and the clean flag rate
above stands beside that interval. It is no defence against an adaptive attacker: {aligned} sees little of an attack inside its ball (see `flag_power` above).

## Data and licence

{LICENCES.get(p.dataset, f"The weights are yours; {p.dataset} is a folder of your own, and its licence is for you to state.")} No figure here is FID: no Inception weights were
at hand, and `frechet_resnet20`, where it is given, names its extractor.
"""


def method_kind(bundle: Bundle) -> str:
    """Return the class name of the method that trained the bundle."""
    method = bundle.manifest.provenance.configuration.get("method", "unknown")
    return str(method["kind"]) if isinstance(method, dict) else {"ebjdat": "EbJdat", "at": "AdversarialTraining"}.get(method, str(method))


def short(git: str) -> str:
    """Return an abbreviated commit that still says when the tree differed from it."""
    commit, dirty, _ = git.partition("-dirty")
    return commit[:12] + dirty


def readme_table(bundle: Bundle) -> str:
    """Return the README's figures: the rows of metrics.json that a new user asks for, the warm start's beside them."""
    baseline = bundle.path / "baseline.json"
    rows = [row for name in IN_README for row in bundle.metrics() if row["metric"] == name]
    return table(rows, read_json(baseline) if baseline.is_file() else [])


def main() -> None:
    """Write the card of the bundle named on the command line, and the README's figures when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    bundle = Bundle.draft(options.bundle)
    baseline = bundle.path / "baseline.json"
    try:
        names = write_card(bundle, bundle.metrics(), read_json(baseline) if baseline.is_file() else [], {})
    except EbjdatError as error:
        sys.exit(str(error))
    bundle.update(*names)
    if options.readme:
        text = options.readme.read_text()
        before, rest = text.split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
        options.readme.write_text(f"{before}{MARKERS[0]}\n\n{readme_table(bundle)}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
