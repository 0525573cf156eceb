"""Which rows of metrics.json a reader is shown first: the card's table, and the eight of the README with what stands beside each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import key
from ebjdat_serve.scores import BASELINE
from training.evaluation.ood import BLANK, NEAR
from training.evaluation.rows import Row, ball_of, eps_name

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
    ("class_agreement_resnet4b", "", ""),
    ("memorised", "", ""),
    ("seconds_per_sample", "", ""),
    ("nll", "DATA test", "fitted"),
    ("brier", "DATA test", "fitted"),
    ("ece", "DATA test", "fitted"),
    ("ece_floor", "DATA test", "fitted"),
    ("flag_rate_clean", "", "score SCORE"),
    ("flag_rate_clean", "", "score BASELINE"),
    ("flag_rate_clean_in_interval", "", "score SCORE"),
    ("attack_success", "", ""),
    ("auroc_energy", "", ""),
    ("auroc_SCORE", "", ""),
    ("auroc_BASELINE", "", ""),
    ("sets_better_than_energy_SCORE", "", ""),
    ("sets_better_than_BASELINE_SCORE", "", ""),
    ("flag_power", "", "alpha 0.05, score SCORE"),
    ("flag_power", "", "alpha 0.05, score BASELINE"),
    ("flag_rate_shifted", "JPEG q75", "score SCORE"),
    ("flag_rate_shifted", "JPEG q75", "score BASELINE"),
    ("auroc_robust_ood", "", "score SCORE"),
    ("auroc_robust_ood", "", "score BASELINE"),
    ("accuracy_with_rejection", "", "score SCORE"),
    ("accuracy_with_rejection", "", "score BASELINE"),
    ("accuracy_at_half_eps", "", ""),
)


@dataclass(frozen=True)
class Shown:
    """A row of the README's table: what it says, which row it is, and what stands beside it."""

    said: str
    metric: str
    where: str = "DATA test"
    how: str = ""
    beside: tuple[str, ...] = ("warm start",)


SOFTMAX = "max softmax"
README = (
    Shown("accuracy on clean images", "accuracy_clean"),
    Shown("accuracy under PGD-20, l-inf EPS", "accuracy_pgd20", how="l-inf EPS"),
    Shown("accuracy under AutoAttack, l-inf EPS", "accuracy_autoattack", how="l-inf EPS"),
    Shown("flagged at alpha 0.05: clean images", "flag_rate_clean", how="alpha 0.05, score SCORE", beside=(SOFTMAX,)),
    Shown("AUROC of the flag's score, CIFAR-100 against clean", "auroc_SCORE", f"DATA test vs {NEAR}", beside=(SOFTMAX,)),
    Shown("flagged at alpha 0.05: blank images", "flag_power", BLANK, "alpha 0.05, score SCORE", (SOFTMAX,)),
    Shown(
        "flagged at alpha 0.05: images that PGD-20 at EPS fooled",
        "flag_power",
        "PGD-20 EPS on DATA test, fooled",
        "alpha 0.05, score SCORE",
        (SOFTMAX,),
    ),
    Shown(
        "samples of the class asked for, to a robust judge",
        "class_agreement_resnet4b",
        "fresh samples",
        beside=("samples of the control pgd-at", "test images"),
    ),
)
"""The eight rows of the README."""


def words_of(bundle: Bundle) -> dict[str, str]:
    """Return what the capitals in a choice stand for."""
    return {"SCORE": served_score(bundle), "BASELINE": BASELINE, "EPS": eps_of(bundle), "DATA": bundle.manifest.provenance.dataset}


def filled(text: str, words: dict[str, str]) -> str:
    """Return a choice's text with its capitals replaced."""
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text


def chief(bundle: Bundle, rows: list[Row]) -> list[Row]:
    """Return the rows that a new user asks for, in the order of ``CHIEF``; of attacks the fooled images apart from the rest, not all."""
    words = words_of(bundle)
    apart = {row["dataset"].removesuffix(", fooled") for row in rows if row["dataset"].endswith(", fooled")}
    found: list[Row] = []
    for metric, where, how in CHIEF:
        metric, where, how = (filled(text, words) for text in (metric, where, how))
        exact = where.endswith(" test")  # not the corrupted ones
        fits = [row for row in rows if row["metric"] == metric and says(row, how)]
        fits = [row for row in fits if (row["dataset"] == where if exact else where in row["dataset"])]
        pooled = [row for row in fits if metric.startswith(("auroc_", "flag_power")) and row["dataset"] in apart]
        found += [row for row in fits if row not in found and row not in pooled]
    return found


def readme_rows(bundle: Bundle, rows: list[Row], baseline: list[Row]) -> Iterator[tuple[str, Row, list[tuple[str, Row]]]]:
    """Yield (words, row, [(words, row that stands beside it)]) of the README's table; what was not measured is left out."""
    words = words_of(bundle)
    for shown in README:
        metric, where, how = (filled(text, words) for text in (shown.metric, shown.where, shown.how))
        row = one(rows, metric, where, how)
        if row is not None:
            found = [(name, beside(name, shown, row, rows, baseline, words)) for name in shown.beside]
            yield filled(shown.said, words), row, [(name, other) for name, other in found if other is not None]


def beside(name: str, shown: Shown, row: Row, rows: list[Row], baseline: list[Row], words: dict[str, str]) -> Row | None:
    """Return the row that is compared with ``row``: the warm start's, max softmax's, or that of other images by the same judge."""
    if name == "warm start":
        return next((other for other in baseline if key(other) == key(row)), None)
    if name == SOFTMAX:
        plain = {**words, "SCORE": BASELINE}
        found = one(rows, filled(shown.metric, plain), filled(shown.where, words), filled(shown.how, plain))
        return None if found is row else found
    return one(rows, row["metric"], name, "")


def one(rows: list[Row], metric: str, where: str, how: str) -> Row | None:
    """Return the first row of a metric whose data are ``where``, or n of it, and whose protocol says ``how``."""
    fits = (row for row in rows if row["metric"] == metric and says(row, how))
    return next((row for row in fits if re.sub(r"^\d+ ", "", row["dataset"]).startswith(where)), None)


def says(row: Row, how: str) -> bool:
    """Return whether a row's protocol says ``how``, as whole words: energy is not energy_entropy."""
    return re.search(rf"{re.escape(how)}(?!\w)", row["protocol"]) is not None if how else True


def served_score(bundle: Bundle) -> str:
    """Return the score that ``suspicious`` is decided by."""
    return bundle.calibration().score if "calibration.json" in bundle.manifest.files else "energy"


def eps_of(bundle: Bundle) -> str:
    """Return the l-inf ball that figures are quoted at."""
    return eps_name(ball_of(bundle.manifest.provenance.dataset).linf)


def worse_than_chance(row: Row) -> bool:
    """Return whether an AUROC's 95 % interval lies below 0.5: one that holds 0.5 says nothing."""
    return bool("stderr" in row and row["value"] + 1.96 * row["stderr"] < 0.5)
