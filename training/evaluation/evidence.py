"""What an evaluation measured, taken into a bundle: row by row, and never a row of fewer images in the place of one of more."""

import re
from dataclasses import dataclass
from pathlib import Path

from ebjdat_serve.bundle import Bundle, read_json, write_json
from ebjdat_serve.errors import BundleError
from training.card import renew_card
from training.evaluation.result_cache import Arrays
from training.evaluation.rows import COMPARING, Row, outcome_free

IN_DATASET = re.compile(r"(^|(?<=vs ))\d+ (?=[a-z])| at n = \d+")  # 500 fresh samples vs 2500 training images
IN_PROTOCOL = re.compile(r"(?<=images' )\(\d+\)|\d+ (?=disjoint blocks|reals)|(?<=distance, )[\d.]+")
"""Counts of images, and what came of them, that a row says in words."""


@dataclass(frozen=True)
class Evaluation:
    """The rows of one subject, the folder they are kept in, and the arrays that images are drawn from."""

    folder: Path
    rows: list[Row]
    arrays: dict[str, Arrays]


@dataclass(frozen=True)
class Merged:
    """A bundle's rows after an evaluation; ``kept``: (its row, the new one of fewer images); ``stale``: of other files, dropped."""

    rows: list[Row]
    taken: list[Row]
    kept: list[tuple[Row, Row]]
    stale: list[Row]

    def said(self) -> str:
        """Return what became of the rows, one line each for those that were kept."""
        lines = [f"{len(self.taken)} rows taken, {len(self.kept)} kept, of more images, {len(self.stale)} stale ones dropped"]
        for old, new in self.kept:
            lines.append(f"  kept {old['metric']} of n = {old['n']} (measured now: n = {new['n']}): {old['dataset']}: {old['protocol']}")
        return "\n".join(lines)


def take(bundle: Bundle, measured: Evaluation, baseline: Path | None = None) -> tuple[Bundle, Merged]:
    """Write the rows of ``measured`` into the bundle with its card and images; ``baseline``: metrics.json of the warm start.

    Raises BundleError when they are of other weights or graphs than the bundle's.
    """
    strange = next((row for row in measured.rows if not bundle.holds(row["of"])), None)
    if strange is not None or not measured.rows:
        of = f"of {strange['of'][:12]}, which it does not hold" if strange else "none"
        raise BundleError(f"{bundle.path} takes no rows {of}: evaluate this bundle first")
    beside = read_json(baseline or bundle.path / "baseline.json") if baseline or "baseline.json" in bundle.manifest.files else []
    merged = merge(bundle.metrics(), measured.rows, bundle)
    shown = measured.arrays if any(row["part"] == "landscape" for row in merged.taken) else {}  # the image is of the rows that stand
    write_json(bundle.path / "metrics.json", merged.rows)
    bundle = bundle.update("metrics.json")
    drawn = "samples.png" in bundle.manifest.files  # by this network: an evaluation changes nothing of that
    return renew_card(bundle, merged.rows, beside, shown, samples=not drawn), merged


def merge(before: list[Row], new: list[Row], bundle: Bundle | None = None) -> Merged:
    """Return ``before`` with each row of ``new`` in the place of the same measurement, unless that is of more images.

    Rows stay in the order of their parts; those without a part, of lower precisions, come last. Of a ``bundle``, rows of other files go.
    """
    stale = [row for row in before if bundle is not None and not bundle.holds(row["of"])]
    held = [row for row in before if row not in stale]
    standing = {measurement(row): row for row in held}
    kept, taken = [], []
    for row in new:
        old = standing.get(measurement(row))
        if old is not None and fewer(row, new, old, held):
            kept.append((old, row))
        else:
            standing[measurement(row)] = row
            taken.append(row)
    parts = list(dict.fromkeys(row.get("part", "") for row in (*held, *new)))
    order = {part: (part == "", parts.index(part)) for part in parts}
    return Merged(sorted(standing.values(), key=lambda row: order[row.get("part", "")]), taken, kept, stale)


def measurement(row: Row) -> tuple[str, str, str, str]:
    """Return what makes two rows of one model the same measurement, whatever the number of images and whatever came out."""
    return row.get("part", ""), row["metric"], IN_DATASET.sub("", row["dataset"]), IN_PROTOCOL.sub("", outcome_free(row))


def fewer(new: Row, new_rows: list[Row], old: Row, old_rows: list[Row]) -> bool:
    """Return whether ``new`` rests on fewer images than ``old``: its own, or the clean ones that it is compared with."""
    if new["n"] < old["n"]:
        return True
    return new.get("part") in COMPARING and clean_behind(new, new_rows) < clean_behind(old, old_rows)


def clean_behind(row: Row, rows: list[Row]) -> int:
    """Return the clean test images that a row compares with; where it does not say, as before that was written down, the most it can be."""
    counted = [int(other["n"]) for other in rows if other["metric"] in ("accuracy_clean", "flag_rate_clean")]
    return int(row["clean"]) if "clean" in row else max(counted, default=0)
