"""Limits on the loss of accuracy of a lower precision; a bundle beyond them is refused.

training/precision.py measures the figures, of an imported model folder_quantization.py, on images of a folder (decision 0032).
"""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import Row

LOWER = ("fp16", "bf16", "int8")


@dataclass(frozen=True)
class PrecisionLimits:
    """Largest loss of a precision against fp32 on the same images; a row's metric is the field's name, _ and the precision."""

    label_disagreement: float = 0.02
    accuracy_clean_drop: float = 0.01
    accuracy_pgd20_transfer_drop: float = 0.02
    accuracy_square_drop: float = 0.03
    energy_error_mean_over_sd: float = 0.1
    step_error_max: float = 0.02  # pixels of [0,1], after two Langevin steps
    flag_rate_excess: float = 0.0  # distance of the clean flag rate, with its own calibration, from its 99 % interval


LIMITS = PrecisionLimits()
OF_TRAINING = ("accuracy_clean_drop", "accuracy_pgd20_transfer_drop", "accuracy_square_drop")
"""Limits on figures that an imported model may lack: its images need no labels, and nobody says what attacks it is to withstand."""
FEWEST, FEWEST_ATTACKED, FEWEST_SQUARE, FEWEST_STEPPED = 200, 100, 50, 8
"""Smallest number of images of a figure: in general, under PGD, under Square, after Langevin steps."""
LEAST = {"accuracy_pgd20_transfer_drop": FEWEST_ATTACKED, "accuracy_square_drop": FEWEST_SQUARE, "step_error_max": FEWEST_STEPPED}


def rows_of(rows: Iterable[Row], precision: str) -> list[Row]:
    """Return the rows of ``precision``."""
    return [row for row in rows if row.precision == precision]


def check(
    rows: Iterable[Row], precision: str, of: Collection[str], limits: PrecisionLimits = LIMITS, *, without: Collection[str] = ()
) -> None:
    """Raise BundleError unless every figure of ``precision`` is measured on one of ``of``, on enough images, and within its limit.

    ``without`` names limits that may have no figure, of what the model does not do or nobody could measure; one that is there counts.
    """
    found = {row.metric: row for row in rows_of(rows, precision) if row.of in of}
    for name, limit in asdict(limits).items():
        row = found.get(f"{name}_{precision}")
        if row is None and name in without:
            continue
        if row is None:
            raise BundleError(
                f"precision {precision} has no figure {name}_{precision} of its current graph: training/precision.py measures it, "
                "of an imported model ebjdat-serve quantize"
            )
        if row.n < LEAST.get(name, FEWEST):
            raise BundleError(
                f"precision {precision} is refused: {name} is of {row.n} images; at least {LEAST.get(name, FEWEST)} are needed"
            )
        if not row.value <= limit:
            raise BundleError(f"precision {precision} is refused: {name} is {row.value:.4g} (n = {row.n}), the limit is {limit:g}")
