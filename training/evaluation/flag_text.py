"""The card's section on the flag, and the README's limits of it: every claim is of a row, and max softmax stands beside."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import figure, recorded_words
from ebjdat_serve.reach import RADIUS
from ebjdat_serve.rows import Row, alone, first, rows_where
from ebjdat_serve.scores import BASELINE
from ebjdat_serve.sentences import eps_name, set_name
from ebjdat_serve.views import VIEWS
from training.evaluation.chosen import ALPHA, model_of, served_score
from training.evaluation.ood_sets import BLANK, IMAGENET, MIXED, NEAR, ODD_SETS, OOD_ATLASES


@dataclass(frozen=True)
class Flagged:
    """The figures of the served score as text, with max softmax's in brackets."""

    bundle: Bundle
    rows: list[Row]

    def both(self, metric: str, **wanted: Any) -> tuple[Row | None, Row | None]:
        """Return the row of the served score and that of max softmax; "{}" in the metric is the score."""
        score = served_score(self.bundle)
        own, plain = (first(self.rows, metric.format(name), score=name, **wanted) for name in (score, BASELINE))
        return own, plain

    def text(self, metric: str, **wanted: Any) -> str:
        """Return both figures, "not measured" for one that is missing."""
        own, plain = (figure(row) if row else "not measured" for row in self.both(metric, **wanted))
        return f"{own} (max softmax: {plain})"

    def counted(self, metric: str, **wanted: Any) -> str:
        """Return both figures and the number of images that they are of."""
        own, plain = self.both(metric, **wanted)
        amounts = " and ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in (own, plain) if row))
        return self.text(metric, **wanted) + (f", n = {amounts}" if amounts else "")

    def lines(self, sets: Iterable[tuple[str, str, dict[str, Any]]]) -> str:
        """Return a table of both shares at ``ALPHA`` of each set that was measured, given as text, metric and fields."""
        found = []
        for text, metric, wanted in sets:
            own, plain = self.both(metric, alpha=ALPHA, **wanted)
            if own:
                amounts = ", ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in (own, plain) if row))
                found.append(f"| {text} | {figure(own)} | {figure(plain) if plain else 'not measured'} | {amounts} |")
        return "\n".join(["| images | flagged | by max softmax | n |", "|---|---|---|---|", *found]) if found else "Not measured."


def flag_sentence(bundle: Bundle, rows: list[Row]) -> str:
    """Return the section on the flag: its views, what its p-values speak of, and its figures, adaptive attacks included."""
    if "calibration.json" not in bundle.manifest.files:
        return "The bundle is not calibrated yet, so nothing is flagged."
    m, f = model_of(bundle), Flagged(bundle, rows)
    calibration = bundle.calibration()
    n = len(calibration.scores)
    views = "\n".join(f"- `{name}`: {VIEWS[name].words};" for name in calibration.views)
    out = "".join(f" Without `{name}`: {why}." for name, why in calibration.left_out.items())
    also = f"\n{words.rstrip()}" if (words := recorded_words(bundle)) else ""
    shifts = [row.shift for row in rows_where(rows, "flag_rate_shifted", score=m.score) if row.shift]
    pgd = f"PGD-20 at {eps_name(m.eps)}"
    sets: list[tuple[str, str, dict[str, Any]]] = [
        ("test images, handled as the calibration's", "flag_rate_mixture", {}),
        ("test images, untouched", "flag_rate_clean", {}),
        *((f"test images after {shift}", "flag_rate_shifted", {"shift": shift}) for shift in shifts),
        *((name, "flag_power", {"dataset": name}) for name in (*OOD_ATLASES, IMAGENET, MIXED, *ODD_SETS)),
        (f"fooled by {pgd}", "flag_power", {"subset": "fooled", **m.test, **m.pgd}),
        (f"attacked by {pgd}, not fooled", "flag_power", {"subset": "not fooled", **m.test, **m.pgd}),
    ]
    return f"""`suspicious` means p < alpha, with p = (1 + how many of {n:,} calibration scores are at least this one) / {n + 1:,}.
The score is a sum of views, each of one number whose term is -log of the share of held-out images of which it is as large:

{views}

the view with the largest term is the answer's `why`.{out}

{mixture_sentence(calibration.handled)}
At most alpha of such images are flagged on average over calibration draws; given this one set the rate is Beta-distributed around it.{also}
At alpha 0.05 the flag finds these shares, beside those of max softmax, which needs no energy and is calibrated alike:

{f.lines(sets)}

{spoken(bundle, rows)}{adaptive(f)}"""


def adaptive(f: Flagged) -> str:
    """Return a paragraph on attackers who know the flag, as far as that was measured."""
    eps = eps_name(model_of(f.bundle).eps)
    said = "**It does not defend against an adaptive attacker**, who knows all views and their ranks"
    junk, rejected = f.both("auroc_robust_ood", moved="ood")[0], f.both("accuracy_with_rejection", alpha=ALPHA)[0]
    limit = first(f.rows, "accuracy_at_half_eps")
    if junk is None or rejected is None or limit is None:
        return f"{said}: how far one gets was not measured for this score."
    return f"""{said}: on OOD images perturbed within {eps} to look normal the AUROC is
{f.text("auroc_robust_ood", moved="ood")} (0.5 is chance, 0 is fooled every time);
the share of images for which no misclassified, unflagged point of the ball was found is
{f.text("accuracy_with_rejection", alpha=ALPHA)} at alpha 0.05,
and a flag robust at {eps} would imply a classifier robust at half of it, where this one keeps {figure(limit)}."""


def mixture_sentence(handled: float) -> str:
    """Return what p-values speak of, by the share of calibration images that were handled."""
    if not handled:
        return "P-values speak of images like those of the calibration split."
    how = "recompressed, resized, brightened or darkened, or made grey"
    return f"P-values speak of images like the calibration split's, a share of {handled:g} of them lightly handled: {how}."


def spoken(bundle: Bundle, rows: list[Row]) -> str:
    """Return a paragraph on which view spoke, of the flagged images of each set that shows one view above the others."""
    views = bundle.calibration().views
    lines = []
    for name in views:
        every = rows_where(rows, "share_of_flags", score=alone(name), attack=None)
        shares = [row for row in every if row.value > 0.5 and row.n >= 20]
        if shares:
            lines.append(f"`{name}` on {', '.join(set_name(row) for row in shares)}")
    return f"Which view speaks, of more than half of the flagged images: {'; '.join(lines)}.\n\n" if lines else ""


def knowing_limit(f: Flagged) -> list[str]:
    """Return what an attacker gains who knows views, ranks and threshold, and with them margin and search, against one who does not."""
    m = model_of(f.bundle)
    blind = first(f.rows, "accuracy_apgd", norm="linf", eps=m.eps)
    aware = f.both("accuracy_with_rejection", alpha=ALPHA)[0]
    searched = first(f.rows, "accuracy_with_search", radius=RADIUS)
    rejected = first(f.rows, "clean_rejected", radius=RADIUS)
    if blind is None or aware is None:
        return []
    said = [
        f"- **The flag is no defence against an attacker who knows it.** One within {eps_name(m.eps)} who does not leaves {figure(blind)}",
        f"of labels right, n = {blind.n:,}; against one who does,",
        f"{f.counted('accuracy_with_rejection', alpha=ALPHA)}, are right or flagged",
    ]
    if searched and rejected:
        said += [
            f"(with small margins and labels that a search in {eps_name(RADIUS)} changes refused, too:",
            f"{figure(searched)}, n = {searched.n:,},",
            f"at the price of {figure(rejected)} of {rejected.n:,} clean images)",
        ]
    return [" ".join(said) + "."]


def odd_limit(f: Flagged) -> list[str]:
    """Return the flag's power on the kind of odd pictures that it sees least, and on blank images."""
    found = [own for name in ODD_SETS if (own := f.both("flag_power", dataset=name, alpha=ALPHA)[0])]
    if not found:
        return ["- Odd pictures, such as blank images: not measured."]
    least = min(found, key=lambda row: row.value)
    blank, hardest = (f.counted("flag_power", dataset=name, alpha=ALPHA) for name in (BLANK, least.dataset))
    said = "**The flag misses odd pictures**" if least.value < 0.5 else "Odd pictures"
    return [f"- {said} of {len(found)} kinds: at alpha 0.05 it flags least of {least.dataset}, {hardest}; of blank images {blank}."]


def benign_limit(f: Flagged, clean: str) -> list[str]:
    """Return the benign change that is flagged most."""
    found = [row for row in rows_where(f.rows, "flag_rate_shifted", score=served_score(f.bundle), alpha=ALPHA) if row.shift]
    if not found:
        return []
    most = max(found, key=lambda row: row.value)
    changed = f.counted("flag_rate_shifted", shift=most.shift, alpha=ALPHA)
    return [f"- Harmless changes: after {most.shift}, the worst of {len(found)}, it flags {changed}; of untouched test images {clean}."]


def close_limit(f: Flagged) -> list[str]:
    """Return how the flag sees images close to the data: another set of photographs, and means of two test images."""
    own, plain = f.both("auroc_{}", dataset=NEAR)
    better = own is not None and plain is not None and own.value < plain.value
    said = f"- Images close to its data{', where max softmax does better' if better else ''}: AUROC against CIFAR-100"
    mixed = f.counted("flag_power", dataset=MIXED, alpha=ALPHA)
    return [f"{said} {f.counted('auroc_{}', dataset=NEAR)}; of means of two test images it flags {mixed}."]
