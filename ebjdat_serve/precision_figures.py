"""What a lower precision costs against fp32 on the same images, as rows of metrics.json; precision.py has their limits."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Engine, Floats, Labels, Outputs, Precision
from ebjdat_serve.measures import flag_rate_interval, wilson
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.views import Seen

ALPHA = 0.05
TIMES, SECONDS = 40, 30.0
"""Number of timed calls of each engine, and the time after which no more are made."""
MakeRow = Callable[..., Row]
"""(metric without its precision, value, n, images?, fields of the row by name) -> the row of a precision."""


def differences(row: MakeRow, full: Outputs, low: Outputs) -> Iterator[Row]:
    """Yield how far the outputs of a precision are from those of fp32."""
    n, apart = len(full.logits), np.abs(low.logits - full.logits).max()
    yield row("logit_error_max", apart / np.abs(full.logits).max(), n)
    yield row("logit_error_over_spread", apart / max(float(np.ptp(full.logits)), 1e-12), n)
    if full.energy is not None and low.energy is not None:
        off = np.abs(low.energy - full.energy)
        yield row("energy_error_max", off.max(), n)
        yield row("energy_error_mean_over_sd", off.mean() / max(float(full.energy.std()), 1e-12), n)
    other = int((low.logits.argmax(1) != full.logits.argmax(1)).sum())
    yield row("label_disagreement", other / n, n, interval=wilson(other, n), interval_kind="wilson")


def right(logits: Floats, label: Labels) -> NDArray[np.bool_]:
    """Return whether each image is classified as ``label``, (N,) bool."""
    result: NDArray[np.bool_] = logits.argmax(axis=1) == label
    return result


def costs(row: MakeRow, metric: str, before: NDArray[np.bool_], after: NDArray[np.bool_], images: Images) -> Iterator[Row]:
    """Yield the accuracy of a precision and its drop from fp32 on the same images; ``before`` and ``after`` are (n,) bool."""
    lost = before.astype(float) - after
    yield row(metric, after.mean(), len(after), images, fp32=float(before.mean()))
    spread = float(lost.std() / len(lost) ** 0.5)
    yield row(f"{metric}_drop", lost.mean(), len(after), images, stderr=spread)


def ood_score(bundle: Bundle, precision: Precision, seen: Seen) -> Floats:
    """Return the OOD score of images by the views of ``precision``, shape (N,)."""
    combination = bundle.combination(precision)
    return combination.score(combination.terms(seen))


def flagged(bundle: Bundle, precision: Precision, score: Floats) -> NDArray[np.bool_]:
    """Return which images the calibration of ``precision`` flags at ALPHA by their scores (N,)."""
    detector = Detector(np.asarray(bundle.calibration(precision).scores), ALPHA)
    return detector.suspicious(detector.p_value(score))


def flag_rows(row: MakeRow, rate: float, n: int, calibration_n: int, precision: str, fp32: float | None = None) -> Iterator[Row]:
    """Yield the flag rate of n clean images at ALPHA by the precision's own calibration, and how far it is from where it should lie."""
    low, high = flag_rate_interval(calibration_n, n, ALPHA)
    yield row("flag_rate_clean", rate, n, alpha=ALPHA, calibration=precision, expected=(low, high), fp32=fp32)
    excess = max(low - rate, rate - high, 0.0)
    yield row("flag_rate_excess", excess, n, alpha=ALPHA, calibration=precision, expected=(low, high))


def speed_rows(row: MakeRow, full: Engine, low: Engine, image: Floats) -> Iterator[Row]:
    """Yield the ratio of images per second of ``low`` to ``full``, engines of one thread, one image at a time and 32."""
    for batch in (1, 32):
        ratio, times = speed_ratio(full, low, image[:batch])
        yield row(f"ratio_classify_batch{batch}", ratio, times, batch=batch, threads=1)


def speed_ratio(full: Engine, low: Engine, image: Floats) -> tuple[float, int]:
    """Return the ratio of images per second of ``low`` to ``full``, and the number of calls that were timed of each."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.monotonic()
    while len(times[0]) < TIMES and (len(times[0]) < 3 or time.monotonic() - began < SECONDS):
        for engine, taken in zip((full, low), times, strict=True):
            started = time.process_time()  # CPU time: other processes delay long calls always and short ones seldom
            engine.classify(image)
            taken.append(time.process_time() - started)
    return float(np.percentile(times[0], 20) / np.percentile(times[1], 20)), len(times[0])
