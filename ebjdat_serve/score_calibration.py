"""Calibrate a bundle on scores that its server recorded: `ebjdat-serve calibrate BUNDLE --scores FILE`.

The rows of one period in audit logs (serve --audit-log), never pictures, become calibration.NAME.json beside the calibration on images.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.atomic import undone
from ebjdat_serve.audit_rows import OTHERS, Recorded, Wanted, read_rows
from ebjdat_serve.bundle import Bundle, check_number, recorded_file, write_json
from ebjdat_serve.detection import flag_range, p_value
from ebjdat_serve.drift import LEVEL, DriftTest, Ranks
from ebjdat_serve.engines import Precision
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.folder_calibration import promise
from ebjdat_serve.folder_images import FEWEST, Say
from ebjdat_serve.listing import printable
from ebjdat_serve.logs import now
from ebjdat_serve.manifest import CALIBRATION_NAME, MOST_SCORES, OF_IMAGES, Calibration, RecordedCalibration
from ebjdat_serve.scored_by import scored_by

ALPHAS = (0.05, 0.01)
MANY = 0.5
"""Share of the pictures from which on it is said that one API key sent them."""


@dataclass(frozen=True)
class Choice:
    """What to read: audit logs, the calibration's name, the precision that it was recorded in, and the period, open where None."""

    files: Sequence[Path]
    name: str = "traffic"
    precision: Precision = "fp32"
    since: datetime | None = None
    until: datetime | None = None


def calibrate_scores(bundle: Bundle, choice: Choice, say: Say = lambda text: print(text, file=sys.stderr, flush=True)) -> Bundle:
    """Record a calibration on the scores in audit logs, and return the bundle.

    Raises EbjdatError for a name that is none, a bundle without a calibration of that precision, a line that no server wrote, and fewer
    than FEWEST pictures, with what was left out; then nothing is written.
    """
    if not CALIBRATION_NAME.fullmatch(choice.name):
        raise EbjdatError(
            f"--name must be of 1 to 40 small letters, digits, _ and -, and not {OF_IMAGES}, which is the calibration on images; "
            f"not {printable(choice.name[:60])!r}"
        )
    if not bundle.calibrated:
        raise EbjdatError(f"{bundle.path} has no calibration, and recorded scores are by its views: ebjdat-serve calibrate BUNDLE DIR")
    bundle.check_files()
    there = bundle.recorded()
    check_number({*there, choice.name})
    by = scored_by(bundle, choice.precision, bundle.combination(choice.precision))
    found = read_rows(choice.files, Wanted(by, choice.precision, choice.since, choice.until))
    n = len(found.scores)
    if n < FEWEST or found.first is None or found.last is None:
        raise EbjdatError(
            f"{n} pictures of this bundle in {choice.precision}; a calibration takes {FEWEST} at least; {left_out(found.skipped)}"
        )
    if sender := busiest(found):
        say(sender)
    if choice.name in there:
        say(f"the calibration {choice.name}, made {there[choice.name].made}, is replaced")
    order = kept(found)
    recorded = RecordedCalibration(
        name=choice.name,
        made=now(),
        since=found.first.isoformat(timespec="milliseconds"),
        until=found.last.isoformat(timespec="milliseconds"),
        precision=choice.precision,
        scored_by=by,
        images=n,
        skipped=dict(found.skipped),
        sources=found.sources,
        scores=np.asarray(found.scores)[order].tolist(),
        margins=np.asarray(found.margins)[order].tolist(),
    )
    file = recorded_file(choice.name)
    with undone(bundle.path / file):
        write_json(bundle.path / file, asdict(recorded))
        return bundle.update(file)


def without_scores(bundle: Bundle, name: str) -> Bundle:
    """Remove the calibration ``name`` of recorded scores, be it damaged, and return the bundle; raise EbjdatError where there is none."""
    named = [(file, file.removeprefix("calibration.").removesuffix(".json")) for file in bundle.manifest.files]
    there = [name for file, name in named if file == recorded_file(name) and CALIBRATION_NAME.fullmatch(name)]
    if name not in there:
        names = ", ".join(there) or "none"
        raise EbjdatError(f"{bundle.path} has no calibration {printable(name[:60])!r} of recorded scores; there are: {names}")
    return bundle.without(recorded_file(name))


def kept(found: Recorded) -> NDArray[np.int64]:
    """Return which pictures are kept, in the order of their scores, at random among equal ones: it tells no time."""
    noise = np.random.default_rng(0)
    chosen = noise.permutation(len(found.scores))[:MOST_SCORES]
    order: NDArray[np.int64] = chosen[np.argsort(np.asarray(found.scores)[chosen], kind="stable")]
    return order


def left_out(skipped: Mapping[str, int]) -> str:
    """Return how many rows were not taken, by reason."""
    if not skipped:
        return "no row was left out"
    return "left out: " + "; ".join(f"{n:,} rows {reason}" for reason, n in skipped.items())


def told(bundle: Bundle, name: str) -> list[str]:
    """Return what a calibration of recorded scores speaks of and what it changes, in lines."""
    recorded = bundle.recorded()[name]
    usual, n, rows = bundle.calibration(recorded.precision), len(recorded.scores), sum(source.lines for source in recorded.sources)
    of = f"{n:,} of {recorded.images:,} pictures, at random" if n < recorded.images else f"{n:,} pictures"
    return [
        f"calibration {name}, {recorded.precision}: {of}, of {rows:,} rows recorded {recorded.period}; {left_out(recorded.skipped)}",
        promise(n),
        *(changed(recorded, usual, alpha) for alpha in ALPHAS),
        drifted(recorded, usual),
        f"p-values then {recorded.guarantee}",
        "an attack of that period then counts as usual: before you serve it, look at what the calibration on images flagged",
    ]


def threshold(scores: Sequence[float], alpha: float) -> float:
    """Return the score above which an image is flagged at ``alpha`` by sorted calibration scores (n,), infinity where none is."""
    n = len(scores)
    k = math.ceil(alpha * (n + 1) - 1e-9) - 1  # p-values below alpha, of n + 1
    return scores[n - k] if k >= 1 else math.inf


def changed(recorded: RecordedCalibration, usual: Calibration, alpha: float) -> str:
    """Return what the threshold at ``alpha`` was and becomes, and how many of the recorded images are flagged by the one on images."""
    share = float((p_value(np.asarray(usual.scores), np.asarray(recorded.scores)) < alpha).mean())
    expected = flag_range(len(usual.scores), alpha)[0]
    limits = [threshold(scores, alpha) for scores in (usual.scores, recorded.scores)]
    before, after = (f"above {limit:.4g} nats" if math.isfinite(limit) else "never" for limit in limits)
    return (
        f"alpha {alpha:g}: flagged {before} by the calibration on images, {after} by this one; "
        f"the former flags {share:.1%} of the recorded images, {expected:.1%} of its own on average"
    )


def drifted(recorded: RecordedCalibration, usual: Calibration) -> str:
    """Return how far the recorded images are from the calibration on images, by the drift test."""
    test, ranks = DriftTest(len(usual.scores)), Ranks(usual.scores)
    for score in np.random.default_rng(0).permutation(np.asarray(recorded.scores)).tolist():
        test.add(int(test.bin_of_rank[ranks.of(score)]))
    log_e, alarm = float(test.log_e), -math.log(LEVEL)
    says = (
        f"tells them from those of the calibration on images: {test.leading}"
        if log_e >= alarm
        else "does not tell them from those of the calibration on images"
    )
    return f"the drift test {says} (log e-value {log_e:.1f}; {alarm:.1f} is an alarm)"


def busiest(found: Recorded) -> str:
    """Return who sent most of the pictures, "" where that is nobody."""
    (name, n), *_ = found.keys.most_common(1)
    share = n / len(found.scores)
    return f"the API key {printable(name)} sent {share:.0%} of the pictures" if name not in ("", OTHERS) and share > MANY else ""
