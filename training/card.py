#!/usr/bin/env python3
"""The model card and its pictures, generated from the bundle's JSON: nothing in it is typed by hand.

`python training/card.py BUNDLE` writes the card again, of the shipped bundle with `--force`; `--readme README.md` also writes the figures between its markers.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle, read_json, write_json
from ebjdat_serve.card import figure, table
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.editing import FORCED, edit
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.generation import generate
from ebjdat_serve.sgld import Prior
from training.evaluation.rows import ball_of, eps_name

Row = dict[str, Any]
MARKERS = ("<!-- figures -->", "<!-- /figures -->")
LICENCES = {
    "cifar10": "Weights: Apache-2.0. CIFAR-10 (Krizhevsky 2009) states no licence; its use here follows research custom. SVHN, non-commercial, "
    "is used for evaluation only.",
    "cifar100": "Weights: Apache-2.0. CIFAR-100 (Krizhevsky 2009) states no licence; its use here follows research custom.",
    "svhn": "Weights of a model trained on SVHN (Netzer et al. 2011), which is for non-commercial use only.",
    "digits": "Weights: Apache-2.0. Digits: UCI, Alpaydin and Kaynak 1998, as scikit-learn ships them (CC BY 4.0).",
}
CHIEF: tuple[tuple[str, str, str], ...] = (  # metric, and what the data and the protocol must contain
    ("accuracy_clean", "", ""),
    ("accuracy_pgd20", "", ""),
    ("accuracy_apgd", "", ""),
    ("accuracy_autoattack", "", ""),
    ("accuracy_autoattack_l2", "", ""),
    ("accuracy_square", "", ""),
    ("accuracy_transfer", "", ""),
    ("accuracy_worst_case", "", ""),
    ("masking_suspected", "", ""),
    ("energy_gap_over_sd", "PGD-20 EPS", ""),
    ("energy_w1_over_sd", "PGD-20 EPS", ""),
    ("joint_energy_w1_over_sd", "PGD-20 EPS", ""),
    ("fid", "", ""),
    ("frechet_resnet20", "", ""),
    ("kernel_distance_efficientnet_lite0", "", ""),
    ("class_agreement_resnet20", "", ""),
    ("memorised", "", ""),
    ("seconds_per_sample", "", ""),
    ("nll", "DATA test", "fitted"),
    ("brier", "DATA test", "fitted"),
    ("ece", "DATA test", "fitted"),
    ("ece_floor", "DATA test", "fitted"),
    ("flag_rate_clean", "", "score SCORE"),
    ("flag_rate_clean_in_interval", "", ""),
    ("auroc_energy", "", ""),
    ("auroc_SCORE", "", ""),
    ("sets_better_than_energy_SCORE", "", ""),
    ("flag_power", "", "alpha 0.05, score SCORE"),
    ("flag_rate_shifted", "JPEG q75", "score SCORE"),
    ("auroc_robust_ood", "", "score SCORE"),
    ("accuracy_with_rejection", "", "score SCORE"),
    ("accuracy_at_half_eps", "", ""),
)


def write_card(bundle: Bundle, rows: list[Row], baseline: list[Row], arrays: dict[str, Any], *, samples: bool = True) -> list[str]:
    """Write README.md, samples.png unless it is not to be drawn again, landscape.png and, when given, baseline.json; return their names.

    Raises BundleError for figures that were measured on other files than the bundle's.
    """
    refuse_stale(bundle, rows)
    names = ["README.md"]
    if samples:
        write_samples(bundle)
        names.append("samples.png")
    # without arrays an earlier picture stays while the figures that it shows stand
    if not write_landscape(bundle, arrays) and not any(row.get("part") == "landscape" for row in rows):
        (bundle.path / "landscape.png").unlink(missing_ok=True)
    if (bundle.path / "landscape.png").is_file():
        names.append("landscape.png")
    if baseline:
        write_json(bundle.path / "baseline.json", baseline)
        names.append("baseline.json")
    (bundle.path / "README.md").write_text(card(bundle, rows, baseline), encoding="utf-8")
    return names


def renew_card(bundle: Bundle, rows: list[Row], baseline: list[Row], arrays: dict[str, Any], *, samples: bool = True) -> Bundle:
    """Write the card as ``write_card`` does and record its files; a picture that it took away is no longer the bundle's."""
    names = write_card(bundle, rows, baseline, arrays, samples=samples)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "landscape.png"}
    return Bundle(bundle.path, replace(bundle.manifest, files=files)).update(*names)


def refuse_stale(bundle: Bundle, rows: list[Row]) -> None:
    """Raise BundleError that names the first figure that is not of the bundle's files."""
    stale = [row for row in rows if not bundle.holds(row["of"])]
    if stale:
        raise BundleError(
            f"{bundle.path / 'metrics.json'} is stale: {len(stale)} figures, {stale[0]['metric']} first, were measured on {stale[0]['of'][:12]}, "
            f"which the bundle does not hold; run python training/evaluate.py {bundle.path} --into {bundle.path}"
        )


def write_samples(bundle: Bundle) -> None:
    """Write samples.png: one column a class, seeds 0 upwards, none chosen."""
    classes = len(bundle.manifest.labels)
    label = np.tile(np.arange(classes, dtype=np.int64), 6)
    samples = generate(
        load_engine(bundle, "auto", "cpu"), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler, label, seed=0
    )
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
    drawn = (bundle.path / "landscape.png").is_file()
    picture = "![energies of clean, adversarial, drawn and strange images](landscape.png)" if drawn else ""
    warm = p.configuration.get("warm_start")
    beside = f"The warm start is `{warm}`, the network that this model was continued from, evaluated identically.\n" if warm else ""
    return f"""# {m.name}@{m.version}

{m.architecture.family} {m.architecture.depth}-{m.architecture.width} on {p.dataset}, {m.input.height} x {m.input.width} pixels: {", ".join(m.labels)}.
Trained as `{p.preset}` by method {method_kind(bundle)} (its configuration is in bundle.json), seed {p.seed}, git {short(p.git)}, begun {p.started}:
{p.steps} of {p.planned_steps} planned steps, rolled back for divergence {p.rollbacks} times. Data sha256 {p.data_sha256[:16]}.

![samples: one column a class, seeds in order, none chosen](samples.png)

Generation is short-run conditional sampling ({m.sampler.steps} steps of {m.sampler.step_size}, gradient clip {m.sampler.grad_clip}, noise {m.sampler.noise_std}) from a
class Gaussian; it is not an exact draw from p(x|y).

## Measured

{beside}Robust accuracies are in pixels of [0,1]; the published EB-JDAT code works in [-1,1], so its 8/255 is 4/255 here.

{table(chief(bundle, rows), baseline)}

{picture}
{weak}
<details><summary>All {len(rows)} figures</summary>

{table(rows, baseline)}

</details>

## What the flag sees

{flag_sentence(bundle, rows)}

## Data and licence

{LICENCES.get(p.dataset, f"The weights are yours; {p.dataset} is a folder of your own, and its licence is for you to state.")} {about_fid(rows)}
"""


def about_fid(rows: list[Row]) -> str:
    """Return what may be called FID here."""
    if any(row["metric"] == "fid" for row in rows):
        return "`fid` is of Inception-v3 with its standard weights; other distances name their extractor."
    return "No figure here is FID: no Inception weights were at hand, and every distance names its extractor."


def method_kind(bundle: Bundle) -> str:
    """Return the class name of the method that trained the bundle."""
    method = bundle.manifest.provenance.configuration.get("method", "unknown")
    return str(method["kind"]) if isinstance(method, dict) else {"ebjdat": "EbJdat", "at": "AdversarialTraining"}.get(method, str(method))


def short(git: str) -> str:
    """Return an abbreviated commit that still says when the tree differed from it."""
    commit, dirty, _ = git.partition("-dirty")
    return commit[:12] + dirty


def chief(bundle: Bundle, rows: list[Row]) -> list[Row]:
    """Return the rows that a new user asks for, in the order of ``CHIEF``."""
    data = bundle.manifest.provenance.dataset
    words = {"SCORE": served_score(bundle), "EPS": eps_name(ball_of(data).linf), "DATA": data}
    found = []
    for metric, where, how in CHIEF:
        for mark, word in words.items():
            metric, where, how = (text.replace(mark, word) for text in (metric, where, how))
        exact = where.endswith(" test")  # not the corrupted ones
        fits = [row for row in rows if row["metric"] == metric and says(row, how)]
        found += [row for row in fits if (row["dataset"] == where if exact else where in row["dataset"]) and row not in found]
    return found


def says(row: Row, how: str) -> bool:
    """Return whether a row's protocol says ``how``, as whole words: energy is not energy_entropy."""
    return re.search(rf"{re.escape(how)}(?!\w)", row["protocol"]) is not None if how else True


def served_score(bundle: Bundle) -> str:
    """Return the score that ``suspicious`` is decided by."""
    return bundle.calibration().score if "calibration.json" in bundle.manifest.files else "energy"


def flag_sentence(bundle: Bundle, rows: list[Row]) -> str:
    """Return what the flag bounds and what it does not, with the figures of a hostile user."""
    if "calibration.json" not in bundle.manifest.files:
        return "The bundle is not calibrated yet, so nothing is flagged."
    calibration = bundle.calibration()
    score = {
        "energy": "s(x) = E(x)",
        "max_softmax": "s(x) = -max log p(y|x)",
        "energy_entropy": f"s(x) = E(x) + {calibration.weight:.2f} H(p(.|x)), the energy and the entropy of the class at equal spread",
    }[calibration.score]

    def figure_of(metric: str, how: str) -> str:
        return next((figure(row) for row in rows if row["metric"] == metric and says(row, how)), "not measured")

    junk = next(
        (
            figure(row)
            for row in rows
            if row["metric"] == "auroc_robust_ood" and says(row, f"score {calibration.score}") and says(row, "moves junk")
        ),
        "not measured",
    )
    held = figure_of("accuracy_with_rejection", f"alpha 0.05, score {calibration.score}")
    limit = figure_of("accuracy_at_half_eps", "")
    jpeg = [row for row in rows if row["dataset"].endswith("JPEG q75")]
    shifted = next((figure(row) for row in jpeg if says(row, f"score {calibration.score}")), "not measured")
    return f"""`suspicious` means p < alpha, with p = (1 + how many of {len(calibration.scores):,} clean calibration scores are at least this one) / {len(calibration.scores) + 1:,} and
{score}. It bounds false alarms on data like the calibration set: at most alpha on average over calibration draws; given this one set the rate is
Beta-distributed around it, and the clean rate above stands beside that interval. JPEG at quality 75 is flagged at {shifted}.
**It is no defence against an adaptive attacker**, and these are the figures: junk that is perturbed within {eps_of(bundle)} to look normal leaves an AUROC of {junk}
(0.5 is blind, 0 is fooled every time); the share of images for which no point of the ball was found that is both wrong and unflagged is {held} at alpha 0.05,
and a flag that truly held at {eps_of(bundle)} would imply a classifier that holds at half of it, where this one keeps {limit}."""


def eps_of(bundle: Bundle) -> str:
    """Return the l-inf ball that figures are quoted at."""
    return eps_name(ball_of(bundle.manifest.provenance.dataset).linf)


def readme_table(bundle: Bundle) -> str:
    """Return the README's figures: the chief rows of metrics.json, and what the flag sees."""
    rows = bundle.metrics()
    return f"{table(chief(bundle, rows), [])}\n\n{flag_sentence(bundle, rows)}"


def rewrite(bundle: Bundle) -> Bundle:
    """Write the card of a bundle again from what it holds."""
    baseline = bundle.path / "baseline.json"
    return renew_card(bundle, bundle.metrics(), read_json(baseline) if baseline.is_file() else [], {})


def main() -> None:
    """Write the card of the bundle named on the command line, and the README's figures when asked."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--readme", type=Path, help="also write the figures between this file's markers")
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    with command(parser):
        bundle = edit(options.bundle, rewrite, force=options.force)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        before, rest = text.split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
        options.readme.write_text(f"{before}{MARKERS[0]}\n\n{readme_table(bundle)}\n\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
