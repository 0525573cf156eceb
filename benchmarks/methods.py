#!/usr/bin/env python3
"""Train every method on digits with three seeds and write docs/methods.md: `python benchmarks/methods.py`.

Rows are written to benchmarks/methods.json one by one, so that an interrupted comparison continues where it stopped; --only NAME trains
some methods, --only without names just writes the page. Figures are of the test split, which no choice was based on. All methods see
the same number of labelled images.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebjdat_serve.bundle import sha256, write_json
from ebjdat_serve.energy import energy
from ebjdat_serve.networks import build
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images
from ebjdat_serve.sentences import attack_words
from training.config import describe, stages
from training.data.datasets import Dataset, load
from training.distributed import Noise
from training.errors import TrainingError
from training.evaluation.attacks import survivors
from training.evaluation.rows import ball_of
from training.loop.clock import Clock
from training.loop.loop import train
from training.loop.state import load_position, load_weights
from training.methods.adversary import Attack, cross_entropy, pgd
from training.overrides import MEASURED, override
from training.presets import METHODS, preset

SEEDS = (0, 1, 2)
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
MARKERS = ("<!-- figures -->", "<!-- /figures -->")
ATTACK = Images(
    dataset="digits", split="test", attack="pgd", norm="linf", eps=ball_of("digits").linf, objective="ce", steps=20, step_over_eps=0.25,
    restarts=1, iterate="each",
)  # fmt: skip


def run(method: str, seed: int, data: Dataset) -> dict[str, Any]:
    """Return one row: a method trained from its own warm start with one seed, evaluated on the test split."""
    *warm, stage = stages(override(preset(method, "digits"), [f"seed={seed}"]))
    began, init = time.process_time(), None
    row: dict[str, Any] = {"method": method, "seed": seed, "configuration": describe(stage)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for each in (*warm, stage):
                with contextlib.redirect_stdout(io.StringIO()):
                    init = train(each, data, Path(folder) / each.name, init=init, clock=Clock(), device=torch.device("cpu"))
        except TrainingError as error:
            return {**row, "failed": str(error).split(":")[0], "seconds": time.process_time() - began}
        assert init is not None
        row |= {"seconds": time.process_time() - began, "rollbacks": load_position(init.with_name("state.pt")).rollbacks}
        model = build(stage.architecture, len(data.names), load_weights(init)).requires_grad_(False)
        return row | measure(model, data) | {"of": sha256(init)}


def measure(model: torch.nn.Module, data: Dataset) -> dict[str, Any]:
    """Return clean and PGD-20 accuracy and the energy gap on the test split."""
    image, label = torch.from_numpy(to_unit(data.test.image)), torch.from_numpy(data.test.label)
    threat = preset("standard", "digits").threat
    x_adv = pgd(model, image, label, objective=cross_entropy, threat=threat, attack=Attack(steps=20), noise=Noise.seeded(0))
    logits, logits_adv = model(image), model(x_adv)
    gap, spread = float((energy(logits_adv) - energy(logits)).mean()), float(energy(logits).std())
    return {
        "n": len(label),
        "accuracy_clean": float((logits.argmax(dim=1) == label).float().mean()),
        "accuracy_pgd20": survivors(model, image, label, threat) / len(label),
        "energy_gap_adv": gap,
        "energy_gap_adv_over_sd": abs(gap) / spread,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of one method's figures over seeds, and a line for --help."""
    done = [row for row in rows if "failed" not in row]
    minutes = np.mean([row["seconds"] for row in rows]) / 60
    if not done:
        return {"summary": f"failed with every seed ({rows[0]['failed']})", "rows": rows}
    names = ("accuracy_clean", "accuracy_pgd20", "energy_gap_adv", "energy_gap_adv_over_sd")
    mean = {name: float(np.mean([row[name] for row in done])) for name in names}
    short = f"clean {mean['accuracy_clean']:.3f}, PGD-20 {mean['accuracy_pgd20']:.3f}, gap/sd {mean['energy_gap_adv_over_sd']:.2f}"
    failed = f", {len(rows) - len(done)} of {len(rows)} seeds failed" if len(done) < len(rows) else ""
    return {"summary": f"{short}; {minutes:.1f} min{failed}", "mean": mean, "rows": rows}


def table(measured: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    keys = ("accuracy_clean", "accuracy_pgd20", "energy_gap_adv", "energy_gap_adv_over_sd")
    lines = [
        f"Test split of digits, n = 300, seeds {', '.join(map(str, SEEDS))}: mean (lowest to highest).",
        f"{attack_words(ATTACK)}; gap = mean E(x_adv) - E(x).",
        "",
        "| method | clean | PGD-20 | gap, nats | abs gap / sd E(x) | roll-backs | CPU minutes, one core |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        rows = measured.get(name, {}).get("rows", [])
        done = [row for row in rows if "failed" not in row]
        if not done:
            lines.append(f"| `{name}` | {measured.get(name, {}).get('summary', 'not measured')} | | | | | |")
            continue
        cells = [spread([row[key] for row in done]) for key in keys]
        again = sum(row["rollbacks"] for row in done)
        failed = f"; {len(rows) - len(done)} of {len(rows)} failed" if len(done) < len(rows) else ""
        minutes = np.mean([row["seconds"] for row in rows]) / 60
        lines.append(f"| `{name}` | {' | '.join(cells)} | {again}{failed} | {minutes:.1f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Train the missing methods and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--again", action="store_true", help="train the methods of --only again even if they were measured")
    parser.add_argument("--json", type=Path, default=MEASURED)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load("digits")
    measured: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    for seed in SEEDS:
        for method in options.only:
            rows = [row for row in measured.get(method, {}).get("rows", []) if not (options.again and row["seed"] == seed)]
            current = json.loads(json.dumps(describe(override(preset(method, "digits"), [f"seed={seed}"]))))
            if not any(row["seed"] == seed and row["configuration"] == current for row in rows):
                rows = [*(row for row in rows if row["seed"] != seed), run(method, seed, data)]
                measured[method] = summarise(sorted(rows, key=lambda row: row["seed"]))
                write_json(options.json, measured)
                print(f"{method} seed {seed}: {measured[method]['summary']}", flush=True)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKERS[0])
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{table(measured)}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
