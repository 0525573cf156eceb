#!/usr/bin/env python3
"""Count the work of a preset, and the GPU hours that it would take: `python benchmarks/gpu_hours.py [PRESET ...]`.

A pass is a forward and a backward of one labelled image, of its attack or its chains; FLOPs are counted by torch, on the network. The
hours are an estimate: that work at shares of the rate at which the card multiplies matrices (benchmarks/gpu.json). None was measured.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ebjdat_serve.networks import Architecture  # noqa: E402 (the checkout's)
from training.config import Preset, stages  # noqa: E402
from training.methods.at import AdversarialTraining  # noqa: E402
from training.methods.ebjdat import EbJdat  # noqa: E402
from training.presets import PRESETS  # noqa: E402

IMAGES = 45_000
"""Labelled training images of CIFAR-10: two splits are held out."""
SHARES = (0.1, 0.3)
"""Of the card's rate of matrix products, what training of convolutional networks usually reaches."""


@dataclass(frozen=True)
class Work:
    """A stage's passes per labelled image and epoch, and its FLOPs."""

    name: str
    epochs: float
    passes: float
    flops: float


def passes(stage: Preset) -> float:
    """Return the passes per labelled image: of the attack, of the images whose loss is taken, and of the chains; an update is one."""
    method = stage.method
    if isinstance(method, AdversarialTraining):
        return method.attack.steps + 1.0
    if isinstance(method, EbJdat):
        chains = method.chains.steps * method.chains.batch / stage.batch_size
        streams = (2 * stage.batch_size + stage.plain_batch + method.chains.batch) / stage.batch_size
        return method.attack.steps + streams + chains
    raise ValueError(f"the passes of {type(method).__name__} are not counted: name a preset of {', '.join(PRESETS)}")


def flops_of_pass(architecture: Architecture) -> float:
    """Return the FLOPs of a forward and a backward of one 32 x 32 image."""
    model, image = architecture.build(10).eval(), torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return float(counter.get_total_flops()) / len(image)


def work(preset: Preset) -> list[Work]:
    """Return the work of each stage of a preset."""
    each = flops_of_pass(preset.architecture)
    return [Work(s.name, s.epochs, passes(s), passes(s) * s.epochs * IMAGES * each) for s in stages(preset)]


def rate() -> tuple[str, float]:
    """Return the card, and its measured rate of bf16 matrix products in FLOP/s."""
    measured = json.loads((ROOT / "benchmarks" / "gpu.json").read_text(encoding="utf-8"))
    return measured["machine"]["device"], 1e9 * max(row["value"] for row in measured["rows"] if row["name"] == "matmul bf16")


def table(names: list[str]) -> list[str]:
    """Return a Markdown table, a line per stage and a sum per preset."""
    card, per_second = rate()
    slow, fast = SHARES
    lines = [f"| stage | epochs | passes an image | 10^15 FLOP | hours of one {card}, estimated |", "|---|---|---|---|---|"]
    for name in names:
        every = work(PRESETS[name])
        lines += [f"| `{one.name}` | {one.epochs:g} | {one.passes:g} | {one.flops / 1e15:,.0f} | |" for one in every]
        total = sum(one.flops for one in every)
        low, high = (total / per_second / share / 3600 for share in (fast, slow))
        lines.append(f"| **{name}** | | | {total / 1e15:,.0f} | {low:.2g} to {high:.2g} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="*", default=["cifar10-full"], metavar="PRESET", help=f"of {', '.join(PRESETS)} (cifar10-full)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if unknown := [name for name in options.preset if name not in PRESETS]:
        parser.error(f"{unknown[0]} is no preset: {', '.join(PRESETS)}")
    print("\n".join(table(options.preset)))
    if options.json:
        rows = [{"name": f"{one.name} FLOP", "value": one.flops, "unit": "FLOP"} for name in options.preset for one in work(PRESETS[name])]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
