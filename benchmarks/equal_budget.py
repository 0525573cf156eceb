#!/usr/bin/env python3
"""Compare objectives that continue one warm start at equal budget: `python benchmarks/equal_budget.py OUT`.

One warm start W, WRN-28-2: FGSM-RS, then PGD-7. Each row continues W with another objective for about the same number of passes (a
forward and a backward of one labelled image): PGD-7 alone is the control. --together rows run in parallel, since a small network leaves
a GPU idle between launches. Finished work is not repeated. OUT gets config, log, fp16 weights, metrics.json and the per-image results
of every row. Needs CIFAR-10 under EBJDAT_DATA, and the requirements of `training/train.py --only-train`.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ebjdat_serve.bundle import read_rows  # noqa: E402 (the checkout's)
from ebjdat_serve.rows import FRESH, Row, rows_where  # noqa: E402

EVALUATED = ("clean", "robustness", "generation")


@dataclass(frozen=True)
class Entry:
    """One training run: a method or preset of training/train.py, its initial weights, and its settings."""

    method: str
    init: str  # another entry's name, "" for none; centred: its head's bias shifted so that mean E(x) = 0
    passes: float  # per labelled image and step
    settings: tuple[str, ...] = ()
    centred: bool = False
    epochs: float = 0.0  # 0: the budget over the passes


CONTINUED = ("lr=0.02", "lr_peak=0.1", "ema=0.999", "gradient_clip=5")
JOINT = (*CONTINUED, "frozen_norm=true")
PAPER = ("w1=1", "w2=1", "alignment=paper", "clean_weight=0.5", "energy_penalty=0", "inner=joint_energy", "threat.eps=0.01568627450980392")
PGD = ("attack.steps=7",)
STARTS = ("warm-fgsm", "warm")
ENTRIES: dict[str, Entry] = {
    "pgd7-scratch": Entry("pgd-at", "", 8, ("ema=0.999", *PGD), epochs=30),
    "warm-fgsm": Entry("fgsm-rs", "", 2, ("batch_size=256", "ema=0.999"), epochs=24),
    "warm": Entry("pgd-at", "warm-fgsm", 8, ("batch_size=256", "lr=0.1", "lr_peak=0.1", "ema=0.999", *PGD), epochs=8),
    # the control, its second seed, and EB-JDAT by recipe 2
    "pgd7": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD)),
    "pgd7-seed1": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD, "seed=1")),
    "ebjdat-light": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0.2", "clean_weight=0")),
    "ebjdat-light-seed1": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0.2", "clean_weight=0", "seed=1")),
    # recipe 3, TRADES with a likelihood, and TRADES alone; recipe 4, DAT's second stage
    "trades-w1": Entry(
        "cifar10-wrn16",
        "warm",
        12.5,
        (*JOINT, "w1=0.03", "alignment=kl", "inner=kl", "w2=6", "clean_weight=1", "attack.steps=7", "attack.start=gaussian"),
    ),
    "trades": Entry("trades", "warm", 9.3, (*CONTINUED, *PGD)),
    "dat": Entry("dat", "warm", 21, ("ema=0.999", "gradient_clip=5", "lr_peak=0.1", "cap=15", "eta=0.25", *PGD), centred=True),
    # the recipe of the model shipped before, the likelihood alone, and recipe 5
    "ebjdat-full": Entry("cifar10-wrn16", "warm", 10.5, JOINT),
    "ebjdat-w1": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0", "clean_weight=0")),
    # half of eps, as in the released code: plain adversarial training, and the paper's signs and weights
    "pgd7-half": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD, "threat.eps=0.01568627450980392")),
    "ebjdat-paper-half": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, *PAPER)),
}


BUDGET = 56.0
"""Passes of a row."""
CONTROL, PREFIX = "pgd7", "wrn28-"
"""The row that differences are taken from, and the prefix of rows in benchmarks/models/."""


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, metric and fields; ``paired``: the difference from the control."""

    heading: str
    metric: str
    fields: dict[str, Any] = field(default_factory=dict)
    paired: bool = False


EPS = {"norm": "linf", "eps": 8 / 255}
COLUMNS = (
    Column("clean", "accuracy_clean"),
    Column("PGD-20 8/255", "accuracy_pgd20", EPS),
    Column("minus control, paired", "accuracy_pgd20", EPS, paired=True),
    Column("APGD-CE + APGD-T 8/255", "accuracy_apgd"),
    Column("KID, ResNet-20", "kernel_distance_resnet20", {"dataset": FRESH}),
    Column("agreement, ResNet-20", "class_agreement_resnet20", {"dataset": FRESH}),
    Column("sd of E(x), nats", "energy_sd"),
)


@dataclass(frozen=True)
class Plan:
    """The output folder, length and evaluation of the runs."""

    out: Path
    passes: float
    network: tuple[int, int]
    amounts: tuple[str, ...]
    shorter: float  # every stage's epochs are multiplied by it
    end: float  # time.monotonic() after which nothing new is started

    def claim(self) -> None:
        """Write the plan into OUT; raise ValueError if OUT holds rows of another plan, which would be mixed with these."""
        file = self.out / "plan.json"
        said = {"passes": self.passes, "network": list(self.network), "amounts": list(self.amounts), "shorter": self.shorter}
        if file.is_file() and (known := json.loads(file.read_text(encoding="utf-8"))) != said:
            raise ValueError(f"{self.out} holds rows of another plan, {known}: name another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said) + "\n", encoding="utf-8")

    def train(self, name: str) -> Path:
        """Train one entry and return its weights, unless they exist."""
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
        words = ["training/evaluate.py", str(kept / "weights.safetensors"), "--processes", "1", "--part", *EVALUATED]
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


def table(kept: Path) -> list[str]:
    """Return a Markdown table of the kept rows with their paired difference from the control and its 95 % interval."""
    lines = [f"| | {' | '.join(column.heading for column in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in ENTRIES:
        folder = kept / f"{PREFIX}{name}"
        if (folder / "metrics.json").is_file():
            rows = read_rows(folder / "metrics.json")
            lines.append(f"| {name} | {' | '.join(cell(rows, column, folder, kept) for column in COLUMNS)} |")
    return lines


def cell(rows: list[Row], column: Column, folder: Path, kept: Path) -> str:
    """Return one figure of a row, the one of most images; empty if it was not measured."""
    found = rows_where(rows, column.metric, **column.fields)
    if not found:
        return ""
    row = max(found, key=lambda row: row.n)
    if column.paired:
        if folder.name == f"{PREFIX}{CONTROL}":
            return ""
        files = (folder / "images.npz", kept / f"{PREFIX}{CONTROL}" / "images.npz")
        return difference(*files, row.key)
    spread = f" ± {row.stderr:.2g}" if row.stderr is not None else ""
    return f"{row.value:.4g}{spread}" + ("" if row.n == 10_000 else f" (n = {row.n})")


def difference(images: Path, control: Path, key: str) -> str:
    """Return the mean difference of two proportions on the same images, with its normal 95 % interval; empty if it is not available.

    ``images`` and ``control`` are the per-image results of two evaluations, images.npz.
    """
    import numpy as np

    if not (images.is_file() and control.is_file()):
        return ""
    with np.load(images) as one, np.load(control) as other:
        if key not in one or key not in other or len(one[key]) != len(other[key]):
            return ""
        change = one[key].astype(np.float64) - other[key]
    half = 1.96 * change.std() / len(change) ** 0.5
    return f"{change.mean():+.4f} [{change.mean() - half:+.4f}, {change.mean() + half:+.4f}]"


def main() -> int:
    """Train and evaluate the requested rows in parallel; return 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, epilog=f"entries: {', '.join(ENTRIES)}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="train nothing: OUT holds kept rows; print their table")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), default=[name for name in ENTRIES if name != "warm-fgsm"])
    parser.add_argument("--passes", type=float, default=BUDGET, help="budget of a row (%(default)s: 7 epochs of PGD-7)")
    parser.add_argument("--network", type=int, nargs=2, default=(28, 2), metavar=("DEPTH", "WIDTH"))
    parser.add_argument("--together", type=int, default=12, help="processes at a time (%(default)s)")
    parser.add_argument("--shorter", type=float, default=1.0, help="multiplies all epochs, for a trial run")
    parser.add_argument("--max-minutes", type=float, default=1e9, help="start nothing new after this time")
    amounts = ["test=10000", "attacked=10000", "attacked_other=100", "strong=1000", "samples=500", "queries=300"]
    parser.add_argument("--amount", nargs="+", default=amounts, help="numbers of images for evaluate.py (%(default)s)")
    options = parser.parse_args()
    if options.table:
        _, _, *rows = lines = table(options.out)
        if not rows:
            parser.error(f"{options.out} holds no {PREFIX}NAME/metrics.json")
        print("\n".join(lines))
        return 0
    end = time.monotonic() + 60 * options.max_minutes
    plan = Plan(options.out.resolve(), options.passes, tuple(options.network), tuple(options.amount), options.shorter, end)
    try:
        plan.claim()
    except ValueError as error:
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
    print("\n".join(table(plan.out / "kept")))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
