#!/usr/bin/env python3
"""Count the work of `cifar10-full`, and estimate the GPU hours that it takes: `python benchmarks/gpu_hours.py [--json FILE] [--document]`.

A pass is a forward and a backward of one image: to the image in inner loops (attack, chains), to the weights in an update. Its FLOPs are
counted by torch, on the network. Two rates measured on the card (benchmarks/gpu.json) bracket the hours, by other work; none was measured:

    fast   Langevin steps of WRN-28-10, the same network, 256 together, passes captured: inner loops alone
    slow   training steps of WRN-28-2 in eight processes together, which keep the card busy: scaled by the FLOPs
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ebjdat_serve.networks import Architecture, Plain  # noqa: E402 (the checkout's)
from training.config import Preset, stages  # noqa: E402
from training.methods.at import AdversarialTraining  # noqa: E402
from training.methods.ebjdat import EbJdat  # noqa: E402
from training.presets import CIFAR10_FULL, preset  # noqa: E402

IMAGES = 45_000
"""Labelled training images of CIFAR-10: two splits are held out."""
FAST = ("torch cuda bf16 step batch 256", "WRN-28-10")
SLOW = "pgd-at WRN-28-2 batch 128 x 8 mps"
"""Names, and the network, of the rows of benchmarks/gpu.json that the hours are estimated from."""
PAGE, MARKS = ROOT / "docs" / "training.md", ("<!-- gpu-hours -->", "<!-- /gpu-hours -->")


@dataclass(frozen=True)
class Passes:
    """Forwards and backwards of one labelled image: in inner loops, and in the update."""

    inner: float
    update: float


@dataclass(frozen=True)
class Cost:
    """A stage's work, and the hours that it takes at the fast and the slow rate."""

    name: str
    epochs: float
    passes: float  # per labelled image
    flops: float
    fast: float
    slow: float


def passes(stage: Preset) -> Passes:
    """Return the passes of a stage per labelled image."""
    method = stage.method
    if isinstance(method, AdversarialTraining):
        return Passes(method.attack.steps, 1)
    if isinstance(method, EbJdat):
        chains = method.chains.steps * method.chains.batch / stage.batch_size
        update = (2 * stage.batch_size + stage.plain_batch + method.chains.batch) / stage.batch_size  # x, x_adv, p(x) and x_neg
        return Passes(method.attack.steps + chains, update)
    raise ValueError(f"the passes of {type(method).__name__} are not counted")


def flops(architecture: Architecture, made: Passes) -> float:
    """Return the FLOPs of passes of 32 x 32 images."""
    return made.inner * flops_of_pass(architecture, update=False) + made.update * flops_of_pass(architecture, update=True)


@cache
def flops_of_pass(architecture: Architecture, *, update: bool) -> float:
    """Return the FLOPs of a forward and a backward of one 32 x 32 image, to the weights (``update``) or to the image."""
    with torch.device("meta"):  # shapes alone
        model = architecture.build(10).eval().requires_grad_(update)
        image = torch.zeros(2, 3, 32, 32, requires_grad=not update)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return float(counter.get_total_flops()) / len(image)


def rates() -> tuple[str, float, float]:
    """Return the card, and its two measured rates in FLOP/s, fast and slow."""
    measured = json.loads((ROOT / "benchmarks" / "gpu.json").read_text(encoding="utf-8"))
    value = {(row["name"], row.get("network")): row["value"] for row in measured["rows"]}
    ran = preset("pgd-at", "small")  # as benchmarks/gpu_parallel.py takes it
    fast = value[FAST] * flops_of_pass(CIFAR10_FULL.architecture, update=False)
    return measured["machine"]["device"], fast, value[SLOW, None] * flops(Plain(28, 2), passes(ran))


def costs(recipe: Preset) -> list[Cost]:
    """Return the cost of each stage of a recipe, without validation and evaluation."""
    _, fast, slow = rates()
    found = []
    for stage in stages(recipe):
        made = passes(stage)
        work = flops(stage.architecture, made) * stage.epochs * IMAGES
        found.append(Cost(stage.name, stage.epochs, made.inner + made.update, work, work / fast / 3600, work / slow / 3600))
    return found


def table(every: list[Cost]) -> str:
    """Return a Markdown table, a line per stage and their sum."""
    lines = [f"| stage | epochs | passes an image | 10^15 FLOP | hours of one {rates()[0]}, estimated |", "|---|---|---|---|---|"]
    lines += [f"| `{c.name}` | {c.epochs:g} | {c.passes:g} | {c.flops / 1e15:.0f} | {c.fast:.2f} to {c.slow:.2f} |" for c in every]
    work, fast, slow = (sum(column) for column in zip(*((c.flops, c.fast, c.slow) for c in every), strict=True))
    return "\n".join([*lines, f"| **together** | | | {work / 1e15:.0f} | **{fast:.1f} to {slow:.1f}** |"])


def document(page: str) -> str:
    """Return docs/training.md with the table between its marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{table(costs(CIFAR10_FULL))}\n\n{MARKS[1]}{after}"


def main() -> None:
    """Print the table; write it into docs/training.md, and its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--document", action="store_true", help="also write the table into docs/training.md")
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    print(table(costs(CIFAR10_FULL)))
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs(CIFAR10_FULL)], indent=1) + "\n", encoding="utf-8")
    if options.document:
        PAGE.write_text(document(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
