"""The selection of main rows: the card's first table, and the README's nine figures with their comparisons."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import Baseline
from ebjdat_serve.rows import CONTROL, FRESH, SUM, Row, first, rows_where
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import eps_name
from training.evaluation.ood_sets import BLANK, NEAR
from training.evaluation.rows import ball_of

ALPHA = 0.05
Fields = dict[str, Any]
BASELINE_NETWORK, SOFTMAX = "baseline", "max softmax"
CONTROLS = ("wrn28-pgd7", "pgd-at")
"""Plain adversarial training in benchmarks/models/, whose samples the bundled model's are compared with: the first that was measured."""


@dataclass(frozen=True)
class Model:
    """The bundle's properties that select rows: the served score, the main l-inf eps, and the data set."""

    score: str
    eps: float
    dataset: str

    @property
    def test(self) -> Fields:
        """Return the fields of the clean test images."""
        return {"dataset": self.dataset, "split": "test", "severity": None, "shift": None}

    @property
    def pgd(self) -> Fields:
        """Return the fields of an attack by PGD at eps."""
        return {"attack": "pgd", "norm": "linf", "eps": self.eps}


def model_of(bundle: Bundle) -> Model:
    """Return the bundle's properties that select rows."""
    dataset = bundle.manifest.provenance.dataset
    return Model(served_score(bundle), ball_of(dataset).linf, dataset)


def chief_figures(m: Model) -> list[tuple[str, Fields]]:
    """Return the metrics and fields of the main rows, in order."""
    fitted, jpeg = {**m.test, "temperature": "fitted"}, {"shift": "JPEG q75"}
    own, plain = {"score": m.score}, {"score": BASELINE}
    plainly = (
        "accuracy_clean accuracy_pgd20 accuracy_apgd accuracy_autoattack accuracy_autoattack_l2 accuracy_square accuracy_transfer "
        "accuracy_worst_case masking_suspected"
    )
    generation = (
        "fid frechet_resnet20 kernel_distance_efficientnet_lite0 class_agreement_resnet20 class_agreement_resnet4b memorised "
        "seconds_per_sample"
    )
    return [
        *((metric, {}) for metric in plainly.split()),
        *((metric, m.pgd) for metric in ("energy_gap_over_sd", "energy_w1_over_sd", "joint_energy_w1_over_sd")),
        *((metric, {}) for metric in generation.split()),
        *((metric, fitted) for metric in ("nll", "brier", "ece", "ece_floor")),
        ("flag_rate_clean", own),
        ("flag_rate_clean", plain),
        ("flag_rate_mixture", own),
        ("flag_rate_mixture", plain),
        ("flag_rate_mixture_in_interval", own),
        ("flag_rate_clean_in_interval", own),
        ("attack_success", {}),
        ("auroc_energy", {}),
        (f"auroc_{m.score}", {}),
        (f"auroc_{BASELINE}", {}),
        (f"sets_better_than_energy_{m.score}", {}),
        (f"sets_better_than_{BASELINE}_{m.score}", {}),
        ("flag_power", {"alpha": ALPHA, **own}),
        ("flag_power", {"alpha": ALPHA, **plain}),
        ("flag_rate_shifted", {**jpeg, **own}),
        ("flag_rate_shifted", {**jpeg, **plain}),
        ("auroc_robust_ood", own),
        ("auroc_robust_ood", plain),
        ("accuracy_with_rejection", own),
        ("accuracy_with_rejection", plain),
        ("accuracy_at_half_eps", {}),
    ]


@dataclass(frozen=True)
class ReadmeRow:
    """A row of the README's table: its text, the selected row, and its comparisons."""

    text: str
    metric: str
    fields: Fields
    baselines: tuple[str, ...] = (BASELINE_NETWORK,)
    others: dict[str, Fields] = field(default_factory=dict)  # rows of the same metric to compare with, by name


def readme_figures(m: Model) -> list[ReadmeRow]:
    """Return the specifications of the README's nine rows."""
    eps, threat, flag = eps_name(m.eps), {"norm": "linf", "eps": m.eps}, {"alpha": ALPHA, "score": m.score}
    fooled = {**m.test, **m.pgd, "subset": "fooled"}
    judged = {f"samples of the control {name}": {"dataset": CONTROL, "control": name} for name in CONTROLS}
    return [
        ReadmeRow("accuracy on clean images", "accuracy_clean", m.test),
        ReadmeRow(f"accuracy under PGD-20, l-inf {eps}", "accuracy_pgd20", {**m.test, **threat}),
        ReadmeRow(f"accuracy under AutoAttack, l-inf {eps}", "accuracy_autoattack", {**m.test, **threat}),
        ReadmeRow("flagged at alpha 0.05: clean images", "flag_rate_clean", {**m.test, **flag}, (SOFTMAX,)),
        ReadmeRow("AUROC of the flag's score, CIFAR-100 against clean", f"auroc_{m.score}", {"dataset": NEAR}, (SOFTMAX,)),
        ReadmeRow("flagged at alpha 0.05: blank images", "flag_power", {"dataset": BLANK, **flag}, (SOFTMAX,)),
        ReadmeRow(f"flagged at alpha 0.05: images that PGD-20 at {eps} fooled", "flag_power", {**fooled, **flag}, (SOFTMAX,)),
        ReadmeRow(
            "samples of the class asked for, to a robust judge",
            "class_agreement_resnet4b",
            {"dataset": FRESH},
            (),
            {**judged, "test images": m.test},
        ),
        ReadmeRow(
            "kernel distance of samples to training images, ResNet-20",
            "kernel_distance_resnet20",
            {"dataset": FRESH},
            (),
            {**judged, "test images": m.test},
        ),
    ]


def chief(bundle: Bundle, rows: list[Row]) -> list[Row]:
    """Return the rows of ``chief_figures``, in order; of attacks, those of fooled images apart from the rest."""
    apart = {replace(row.images, subset=None) for row in rows if row.subset == "fooled"}
    found: list[Row] = []
    for metric, wanted in chief_figures(model_of(bundle)):
        fits = rows_where(rows, metric, **wanted)
        found += [row for row in fits if row not in found and not (row.score and row.images in apart)]
    return found


def readme_rows(bundle: Bundle, rows: list[Row], baseline: Baseline) -> Iterator[tuple[str, Row, list[tuple[str, Row]]]]:
    """Yield (text, row, [(text, row to compare with)]) of the README's table, without rows that were not measured."""
    m = model_of(bundle)
    for spec, plain in zip(readme_figures(m), readme_figures(replace(m, score=BASELINE)), strict=True):
        row = first(rows, spec.metric, **spec.fields)
        if row is not None:
            yield spec.text, row, list(comparisons(spec, plain, row, rows, baseline))


def comparisons(spec: ReadmeRow, plain: ReadmeRow, row: Row, rows: list[Row], baseline: Baseline) -> Iterator[tuple[str, Row]]:
    """Yield (text, row) to compare ``row`` with: the baseline's, max softmax's (``plain``), or other images' by the same judge."""
    if BASELINE_NETWORK in spec.baselines:
        same = [other for other in baseline.rows if other.key == row.key]
        if same:
            most = max(same, key=lambda other: (other.n == row.n, other.n))
            yield baseline.title if most.n == row.n else f"{baseline.title} (n = {most.n:,})", most
    if SOFTMAX in spec.baselines:
        other = first(rows, plain.metric, **plain.fields)
        if other is not None and other is not row:
            yield SOFTMAX, other
    for name, wanted in spec.others.items():
        if (other := first(rows, spec.metric, **wanted)) is not None:
            yield name, other


def served_score(bundle: Bundle) -> str:
    """Return the name of the score of ``suspicious``, the sum of views; of a bundle that is not calibrated the energy."""
    return SUM if "calibration.json" in bundle.manifest.files else "energy"


def worse_than_chance(row: Row) -> bool:
    """Return whether an AUROC's 95 % interval lies below 0.5."""
    return row.stderr is not None and row.value + 1.96 * row.stderr < 0.5
