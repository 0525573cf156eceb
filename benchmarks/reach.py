#!/usr/bin/env python3
"""Measure margin, walk, search and policy (ebjdat_serve/reach.py) on the bundled model: `python benchmarks/reach.py [--json FILE]`.

The rows are those of `training/evaluate.py --part reach` at the sizes of docs/decisions/0027-reach.md. P-values come from the
calibration split; test images are only measured. Results are kept in chunks, so a killed run continues, and rows are written as they
come. On one CPU thread the default takes about an hour and a half.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.logs import configure
from ebjdat_serve.rows import Row, to_json
from ebjdat_serve.sentences import eps_name, protocol_words, set_name
from ebjdat_serve.server.settings import SHIPPED
from training.data.bundle_data import check_data, dataset_of
from training.evaluate import context
from training.evaluation.context import SUITES
from training.evaluation.evaluated_model import bundle_spec
from training.evaluation.reach_rows import coverage_rows, rejection_rows, review_rows, separation_rows

PARTS = {"review": review_rows, "coverage": coverage_rows, "separation": separation_rows, "rejection": rejection_rows}


def name_of(row: Row) -> str:
    """Return the name of a row in the table."""
    parts = [row.metric + (f" {row.score}" if row.score else ""), set_name(row)]
    parts += [f"share {row.alpha:g}"] if row.views else []
    parts += [" + ".join(row.views)] if row.views else []
    parts += [f"radius {eps_name(row.radius)}"] if row.radius is not None else []
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--n", type=int, default=500, help="images under PGD and transfer, and of each corruption (%(default)s)")
    parser.add_argument("--strong", type=int, default=200, help="images under APGD and Square (%(default)s)")
    parser.add_argument("--clean", type=int, default=1000, help="clean images of review and coverage (%(default)s)")
    parser.add_argument("--hostile", type=int, default=200, help="images under the adaptive attack (%(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="of Square (%(default)s)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="of the results (under EBJDAT_RUNS)")
    o = parser.parse_args(arguments)
    configure("text", "%(message)s", sys.stdout)
    logging.getLogger("training").setLevel(logging.DEBUG)  # progress every ten seconds
    torch.set_num_threads(1)
    bundle = Bundle.load(SHIPPED)
    data = dataset_of(bundle)
    check_data(bundle, data)
    sizes = {"test": o.clean, "looked": o.n, "shifted": o.n, "strong": o.strong, "hostile": o.hostile, "queries": o.queries}
    c = context(bundle_spec(SHIPPED), data, replace(SUITES["quick"], **sizes), processes=o.processes, bundle=bundle, folder=o.folder)
    rows: list[dict[str, Any]] = []
    for part in o.part:
        for row in PARTS[part](c):
            rows.append({"name": name_of(row), "unit": "share" if row.interval_kind == "wilson" else "", **to_json(row)})
            print(f"{name_of(row)}: {row.value:.4f} of {row.n}; {protocol_words(row)}", flush=True)
            if o.json:
                write_json(o.json, rows)
    c.ledger.close()


if __name__ == "__main__":
    main()
