"""Scores of views on image sets, and the figures of their sums."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.view_candidates import LARGEST, SUMS, VIEWED, KnownMore
from ebjdat_serve.engines import Floats
from ebjdat_serve.views import DEFAULT_VIEWS, Combination, Doubles, Seen, fit, rank_term, score_of, statistics
from training.evaluation.metrics import auroc, auroc_difference_stderr, auroc_stderr, flag_rate_interval

Row = dict[str, Any]
ALPHA, HANDLED = 0.05, 10_000


@dataclass(frozen=True)
class Mode:
    """Whether statistics are fitted on clean or handled images, and whether ranks and calibration are of clean ones or the mixture."""

    fitted: str
    calibrated: str


CHOSEN = "handled fit, mixture"
MODES = {
    "clean fit, clean calibration": Mode("clean", "clean"),
    "handled fit, clean calibration": Mode("handled", "clean"),
    "clean fit, mixture": Mode("clean", "handled"),
    CHOSEN: Mode("handled", "handled"),
}


class Figures:
    """Scores of every view on every set, and rows of sums."""

    def __init__(self, seen: dict[str, Seen], lightly: Floats, weight: Floats, bias: Floats) -> None:
        self.seen = seen
        self.raw: dict[str, dict[str, dict[str, Floats]]] = {}
        self.fits: dict[str, Combination] = {}
        for kind, images in (("clean", seen["clean/train"].image[:HANDLED]), ("handled", lightly)):
            train, selection = seen["clean/train"], seen["clean/selection"]
            known = KnownMore(train, statistics(images), selection, weight=weight, bias=bias, images=images)
            found = fit(list(VIEWED), known, VIEWED)
            found = found.with_ranks_of(found.raw(selection))
            self.fits[kind] = found
            self.raw[kind] = {
                name: {
                    where: score_of(VIEWED[name], found.ready[name], each) for where, each in seen.items() if not where.endswith("/train")
                }
                if kind == "clean" or name.startswith("statistics")
                else self.raw["clean"][name]
                for name in VIEWED
            }

    def terms(self, names: tuple[str, ...], mode: Mode, where: str, part: slice = slice(None)) -> Doubles:
        """Return the terms (N, V) of a set, with ranks among ``part`` of the selection split."""
        raw = self.raw[mode.fitted]
        clean = {name: np.sort(raw[name][f"{mode.calibrated}/selection"][part]) for name in names}
        return np.stack([rank_term(clean[name], raw[name][where]) for name in names], axis=1)

    def score(self, title: str, mode: Mode, where: str, part: slice = slice(None)) -> Doubles:
        """Return the sum of the terms; of a view alone its own score, which has the same order and fewer ties."""
        if title == LARGEST:
            largest: Doubles = self.terms(DEFAULT_VIEWS, mode, where, part).max(axis=1)
            return largest
        names = SUMS[title]
        if len(names) == 1:
            return self.raw[mode.fitted][names[0]][where].astype(np.float64)
        total: Doubles = self.terms(names, mode, where, part).sum(axis=1)
        return total

    def threshold(self, title: str, mode: Mode, part: slice = slice(None)) -> float:
        """Return the least score that is flagged at alpha: (1 + #{calibration >= s}) / (n + 1) < alpha."""
        clean = np.sort(self.score(title, mode, f"{mode.calibrated}/calibration", part))
        allowed = int(np.ceil(ALPHA * (len(clean) + 1) - 1 - 1e-9)) - 1  # scores that may reach a flagged one
        return float(np.nextafter(clean[len(clean) - allowed - 1], np.inf))

    def rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the clean rate, AUROC and power of every OOD set, and the flag rate of every benign one, on test images."""
        mode = MODES[mode_name]
        least = self.threshold(title, mode)
        clean = self.score(title, mode, "clean/test")
        common = {"score": title, "mode": mode_name}
        interval = flag_rate_interval(len(self.seen["clean/calibration"].logits), len(clean), ALPHA)
        for where in ("clean/test", f"{mode.calibrated}/test"):
            rate = float((self.score(title, mode, where) >= least).mean())
            yield row("flag rate", where, rate, len(clean), **common, expected=interval)
        for where in self.seen:
            role = where.split("/")[0]
            if role not in ("ood", "odd", "benign"):
                continue
            value = self.score(title, mode, where)
            if role == "benign":
                yield row("flag rate", where, float((value >= least).mean()), len(value), **common)
                continue
            yield row("power", where, float((value >= least).mean()), len(value), **common)
            if role == "ood":
                yield row("AUROC", where, auroc(clean, value), len(value), **common, stderr=auroc_stderr(clean, value))

    def choice_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the same of the second half of the selection split, with ranks of the first, against proxies: what is chosen by."""
        mode, half = MODES[mode_name], len(self.seen["clean/selection"].logits) // 2
        first = slice(0, half)
        least = self.threshold(title, mode, first)
        clean = self.score(title, mode, "clean/selection", first)[half:]
        common = {"score": title, "mode": mode_name}
        yield row("flag rate", "clean/selection, second half", float((clean >= least).mean()), len(clean), **common)
        areas, powers = [], []
        for where in self.seen:
            value = self.score(title, mode, where, first) if where.startswith(("proxy/", "benign selection/")) else None
            if value is None:
                continue
            if where.startswith("benign"):
                yield row("flag rate", where, float((value >= least).mean()), len(value), **common)
            else:
                areas.append(auroc(clean, value))
                powers.append(float((value >= least).mean()))
        yield row("AUROC", "mean of proxies", float(np.mean(areas)), len(areas), **common)
        yield row("power", "mean of proxies", float(np.mean(powers)), len(powers), **common)

    def paired_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield AUROC(sum) - AUROC(max softmax) on each OOD set, with DeLong's paired standard error."""
        mode = MODES[mode_name]
        for where in (name for name in self.seen if name.startswith("ood/")):
            a, b = ([self.score(each, mode, at) for at in ("clean/test", where)] for each in (title, "max_softmax"))
            difference = auroc(*a) - auroc(*b)
            yield row(
                "AUROC less max softmax", where, difference, len(a[1]), score=title, mode=mode_name, stderr=auroc_difference_stderr(*a, *b)
            )

    def spoke_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the share of each set's flagged images of which a view has the largest term."""
        mode, names = MODES[mode_name], SUMS[title]
        least = self.threshold(title, mode)
        for where in (name for name in self.seen if name.split("/")[0] in ("ood", "odd", "benign") or name == "clean/test"):
            terms = self.terms(names, mode, where)
            flagged = terms[terms.sum(axis=1) >= least]
            for index, name in enumerate(names):
                if len(flagged):
                    share = float((flagged.argmax(axis=1) == index).mean())
                    yield row("share spoken", where, share, len(flagged), score=title, mode=mode_name, view=name)


def row(metric: str, where: str, value: float, n: int, **more: Any) -> Row:
    """Return one figure."""
    title = more.get("score", "")
    by = f", {more['view']}" if "view" in more else ""
    name = f"{metric}, {where}: {title}{by}" + (f", {more['mode']}" if "mode" in more else "")
    return {"name": name, "value": value, "unit": "", "metric": metric, "set": where, "n": n, **more}
