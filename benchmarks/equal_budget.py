#!/usr/bin/env python3
"""Compare objectives that continue one warm start at equal budget: `python benchmarks/equal_budget.py OUT`.

One warm start W, WRN-28-2: FGSM-RS, then PGD-7. Each row continues W with another objective for about the same number of passes (a
forward and a backward of one labelled image): PGD-7 alone is the control. --together rows run in parallel, since a small network leaves
a GPU idle between launches. Finished work is not repeated. OUT gets config, log, fp16 weights, metrics.json and the per-image results
of every row. Needs CIFAR-10 under EBJDAT_DATA, and the requirements of `training/train.py --only-train`.

--evaluate measures what kept rows lack (equal_budget_rows.py), --document writes docs/equal_budget.md and docs/pareto.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.equal_budget_entries import AVERAGES, BUDGET, ENTRIES, MEASURED, PREFIX, STARTS  # noqa: E402 (the checkout's)
from ebjdat_serve.bundle import sha256  # noqa: E402
from ebjdat_serve.errors import EbjdatError  # noqa: E402

EVALUATED = ("clean", "robustness", "generation")
AMOUNTS = ("test=10000", "attacked=10000", "attacked_other=100", "strong=1000", "samples=500", "queries=300")
"""Numbers of images of a new row."""
COMPLETED = ("test=10000", "attacked=10000", "strong=500", "looked=500", "samples=500")
"""Numbers of images of what a kept row lacks."""


@dataclass(frozen=True)
class Plan:
    """The output folder, length and evaluation of the runs."""

    out: Path
    passes: float
    network: tuple[int, int]
    amounts: tuple[str, ...]
    shorter: float  # every stage's epochs are multiplied by it
    end: float  # time.monotonic() after which nothing new is started
    parts: tuple[str, ...] = EVALUATED
    warm: Path | None = None  # weights of the entry ``warm``, which is then not trained

    def claim(self) -> None:
        """Write the plan into OUT; raise ValueError if OUT holds rows of another plan, which would be mixed with these."""
        file = self.out / "plan.json"
        said: dict[str, Any] = {
            "passes": self.passes,
            "network": list(self.network),
            "amounts": list(self.amounts),
            "shorter": self.shorter,
        }
        said |= {"warm": sha256(self.warm)} if self.warm else {}
        if file.is_file() and (known := json.loads(file.read_text(encoding="utf-8"))) != said:
            raise ValueError(f"{self.out} holds rows of another plan, {known}: name another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said) + "\n", encoding="utf-8")

    def train(self, name: str) -> Path:
        """Train one entry, unless its weights exist, and return them."""
        if name == "warm" and self.warm is not None:
            return self.warm
        entry = ENTRIES[name]
        if found := weights_of(self.out / "runs" / name):
            return found
        epochs = self.shorter * (entry.epochs or self.passes / entry.passes)
        settings = [f"depth={self.network[0]}", f"width={self.network[1]}", f"epochs={epochs:.2f}", *entry.settings]
        words = ["training/train.py", entry.method, "--run", name, "--only-train", "--threads", "1", "--set", *settings]
        if entry.method != "cifar10-wrn16":
            words[2:2] = ["--data", "cifar10", "--budget", "small"]
        if entry.init:
            init = self.train(entry.init)
            words += ["--init", str(centred(init) if entry.centred else init)]
        if (self.out / "runs" / name).is_dir():
            words.append("--resume")
        self.call(words, name, "train")
        found = weights_of(self.out / "runs" / name)
        assert found is not None
        return found

    def evaluate(self, name: str) -> None:
        """Evaluate one entry's weights in the expensive parts, and keep the results that later work needs."""
        weights = self.train(name)
        kept = self.out / "kept" / f"{PREFIX}{name}"
        if (kept / "metrics.json").is_file():
            return
        kept.mkdir(parents=True, exist_ok=True)
        halve(weights, kept / "weights.safetensors")
        for file in (weights.parent / "log.jsonl", weights.parent.parent / "config.json"):
            shutil.copy(file, kept)
        # evaluates the fp16 weights, which are the ones kept
        words = ["training/evaluate.py", str(kept / "weights.safetensors"), "--processes", "1", "--part", *self.parts]
        folder = self.out / "measured" / name
        self.call([*words, "--folder", str(folder), "--amount", *self.amounts], name, "evaluate")
        for kind in ("arrays.npz", "images.npz", "drawings.npz", "subject.json", "metrics.json"):  # the last marks that all exist
            if (folder / kind).is_file():
                shutil.copy(folder / kind, kept)

    def call(self, words: list[str], name: str, what: str) -> None:
        """Run a command of the project, its output in a log; raise RuntimeError with its last line when it fails."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise RuntimeError(f"no time was left to {what} {name}")
        log = self.out / "logs" / f"{name}.{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))  # which may hold further packages
        environment = {**os.environ, "EBJDAT_RUNS": str(self.out / "runs"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with log.open("a", encoding="utf-8") as sink:
            done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{name}: {what} ended with {done.returncode}: {lines[-1]}")
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {what} took {time.monotonic() - began:.0f} s", flush=True)


def weights_of(run: Path) -> Path | None:
    """Return a run's finished weights, or None."""
    return next(iter(run.glob("*/weights.safetensors")), None)


def centred(weights: Path) -> Path:
    """Return ``weights`` with the mean of E(x) on held-out training images subtracted by the head's bias: DAT needs E about 0."""
    import torch

    from ebjdat_serve.energy import energy
    from ebjdat_serve.pixels import to_unit
    from training.data.datasets import load
    from training.evaluation.evaluated_model import load_weights
    from training.loop.state import save_weights

    model = load_weights(weights)
    with torch.no_grad():
        mean = energy(model(torch.from_numpy(to_unit(load("cifar10").selection.first(500).image)))).mean()
        model.head.bias.add_(mean)
    file = weights.with_name("centred.safetensors")
    save_weights(model.state_dict(), file)
    return file


def halve(weights: Path, file: Path) -> None:
    """Write ``weights`` in fp16."""
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(weights).items()}, file)


def kept(options: argparse.Namespace) -> int:
    """Measure what kept rows lack, print their tables, or write the document of them; return 1 when a row failed."""
    failed = False
    if options.evaluate:
        import torch

        from benchmarks.equal_budget_rows import complete
        from training.evaluation.context import suite_of

        torch.set_num_threads(1)
        suite = suite_of("quick", None, options.amount or COMPLETED)
        for name in options.evaluate:
            try:
                complete(options.out, name, options.measure or MEASURED, suite)
            except (EbjdatError, OSError) as error:
                failed = True
                print(f"{name}: {error}", file=sys.stderr, flush=True)
    if options.document:
        from benchmarks.equal_budget_table import document, kept_rows, other_starts, pareto

        page = ROOT / "docs" / "equal_budget.md"
        page.write_text(document(page.read_text(encoding="utf-8"), options.out), encoding="utf-8")
        (ROOT / "docs" / "pareto.png").write_bytes(pareto(kept_rows(options.out), other_starts(options.out)))
    if options.table:
        show(options.out)
    return 1 if failed else 0


def show(models: Path) -> None:
    """Print the tables of the kept rows."""
    from benchmarks.equal_budget_table import ACCURACY, DETECTION, kept_rows, other_starts, samples_table, table

    if found := kept_rows(models):
        print("\n\n".join([table(found, ACCURACY), table(found, DETECTION), samples_table(found, other_starts(models))]))


def main() -> int:
    """Train and evaluate the requested rows in parallel; return 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, epilog=f"entries: {', '.join(ENTRIES)}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="train nothing: OUT holds kept rows; print their tables")
    parser.add_argument("--document", action="store_true", help="train nothing: write docs/equal_budget.md and docs/pareto.png from OUT")
    rows = sorted({*ENTRIES, *AVERAGES})
    parser.add_argument("--evaluate", nargs="+", choices=rows, metavar="ROW", help="train nothing: measure what kept rows of OUT lack")
    parser.add_argument("--measure", nargs="+", choices=MEASURED, help=f"of --evaluate ({', '.join(MEASURED)})")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), default=[name for name in ENTRIES if name != "warm-fgsm"])
    parser.add_argument("--passes", type=float, default=BUDGET, help="budget of a row (%(default)s: 7 epochs of PGD-7)")
    parser.add_argument("--network", type=int, nargs=2, default=(28, 2), metavar=("DEPTH", "WIDTH"))
    parser.add_argument("--together", type=int, default=12, help="processes at a time (%(default)s)")
    parser.add_argument("--shorter", type=float, default=1.0, help="multiplies all epochs, for a trial run")
    parser.add_argument("--max-minutes", type=float, default=1e9, help="start nothing new after this time")
    parser.add_argument("--warm", type=Path, metavar="WEIGHTS", help="continue these weights, instead of training the warm start")
    parser.add_argument("--part", nargs="+", default=EVALUATED, help="parts of evaluate.py that new rows get (%(default)s)")
    parser.add_argument(
        "--amount", nargs="+", help=f"numbers of images (new rows: {', '.join(AMOUNTS)}; --evaluate: {', '.join(COMPLETED)})"
    )
    options = parser.parse_args()
    if options.together < 1:
        parser.error(f"--together {options.together}: give 1 or more")
    if options.measure and not options.evaluate:
        parser.error("--measure is of --evaluate ROW: without it, OUT is trained")
    if options.table or options.document or options.evaluate:
        if not any(options.out.glob(f"{PREFIX}*/metrics.json")):
            parser.error(f"{options.out} holds no {PREFIX}NAME/metrics.json")
        try:
            return kept(options)
        except EbjdatError as error:  # a damaged row, an unknown amount
            parser.error(str(error))
    end = time.monotonic() + 60 * options.max_minutes
    plan = Plan(
        options.out.resolve(),
        options.passes,
        tuple(options.network),
        tuple(options.amount or AMOUNTS),
        options.shorter,
        end,
        tuple(options.part),
        options.warm and options.warm.resolve(),
    )
    try:
        plan.claim()
    except (ValueError, OSError) as error:  # also weights of --warm that are not there
        parser.error(str(error))
    failed: list[str] = []

    def attempt(name: str, work: Callable[[str], object] = plan.evaluate) -> None:
        try:
            work(name)
        except Exception as error:  # noqa: BLE001 (the others continue)
            failed.append(f"{name}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.together) as pool:
        for name in options.only:
            if not ENTRIES[name].init and name not in STARTS:
                pool.submit(attempt, name)
        if any(ENTRIES[name].init for name in options.only):
            attempt("warm", plan.train)
        list(pool.map(attempt, (name for name in options.only if name in STARTS or ENTRIES[name].init)))
    show(plan.out / "kept")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
