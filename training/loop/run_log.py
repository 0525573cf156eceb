"""What people see of a run: log.jsonl, one progress line, TensorBoard on request, and figures on held-out training images."""

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebjdat_serve import pixels
from ebjdat_serve.energy import energy, score
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.install import install
from ebjdat_serve.sgld import sgld
from ebjdat_serve.wideresnet import WideResNet
from training.data.augment import to_device, to_float
from training.data.datasets import Dataset
from training.distributed import Noise, Ranks
from training.errors import TrainingDiverged
from training.loop.clock import duration
from training.loop.start import precision
from training.loop.state import State, previous
from training.methods import Terms
from training.methods.adversary import Attack, cross_entropy, pgd
from training.methods.replay import Starts, fit_prior
from training.presets import Preset

Row = dict[str, float]
BINS = 48
EVERY = 60.0
"""Seconds between two lines of progress, where there is no terminal."""
log = logging.getLogger("training")


class RunLogger:
    """The log of one stage; only the first rank writes."""

    def __init__(self, folder: Path, preset: Preset, total: int, step: int, *, writes: bool, tensorboard: bool) -> None:
        self.folder, self.total, self.writes = folder, total, writes
        self.log = folder / "log.jsonl"
        if writes and self.log.is_file() and not self.log.read_bytes().endswith(b"\n"):
            with self.log.open("a", encoding="utf-8") as file:
                file.write("\n")  # a kill cut the last line short
        self.name, self.last = preset.name, {"step": step}  # the newest of each figure
        self.began, self.first = time.monotonic(), step
        self.told = self.began
        self.bar = progress_bar(preset.name, total, step) if writes else None
        self.board = summary_writer(folder) if tensorboard and writes else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one line to the log; show it, or move the progress line where there is one."""
        if not self.writes:
            return
        shown = {name: rounded(value) for name, value in row.items()}
        line = json.dumps(shown, allow_nan=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        log.debug("%s", self.name, extra={"fields": {name: value for name, value in shown.items() if name != "histograms"}})
        self.last |= row
        if self.bar is None:
            self.tell()
        else:
            self.bar.n = row["step"]
            self.bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "accuracy_adv", "selection_pgd10") if name in row})
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "of") and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])

    def tell(self) -> None:
        """Say once a minute, where no progress line moves, how far it is."""
        now = time.monotonic()
        if now - self.told < EVERY or self.last["step"] <= self.first:
            return
        self.told, done = now, self.last["step"] - self.first
        left = (now - self.began) * (self.total - self.last["step"]) / done
        log.info("%s: step %d of %d, about %s left%s", self.name, self.last["step"], self.total, duration(left), self.figures())

    def figures(self) -> str:
        """Return the last look's accuracies in words."""
        shown = {"clean": "selection_clean", "PGD-10": "selection_pgd10"}
        found = [f"{name} {self.last[key]:.3f}" for name, key in shown.items() if key in self.last]
        return f"; {', '.join(found)} of held-out training images" if found else ""

    def picture(self, step: int, grid: pixels.Pixels) -> None:
        """Keep a sheet of samples."""
        if not self.writes:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        (self.folder / "samples" / f"{step:07d}.png").write_bytes(pixels.encode_png(grid, generated=True))
        if self.board is not None:
            self.board.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """End the progress line, say what was reached, and flush TensorBoard's file."""
        if self.writes:
            took = duration(time.monotonic() - self.began)
            log.info("%s: %d of %d steps in %s%s", self.name, self.last["step"], self.total, took, self.figures())
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def rounded(value: Any) -> Any:
    """Return a number as the log shows it; what is not finite, as a word, for JSON has no number for it."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else str(value)


def progress_bar(name: str, total: int, step: int) -> Any:
    """Return tqdm's line with rate and time left, on a terminal and where tqdm is installed; else None: lines are printed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=step, desc=name, unit="step", dynamic_ncols=True)


def summary_writer(folder: Path) -> Any:
    """Return TensorBoard's writer; raise EbjdatError naming the extra when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EbjdatError(f"TensorBoard is not installed: {install('watch')}") from error
    return SummaryWriter(str(folder / "tensorboard"))


class Validator:
    """Clean and PGD-10 accuracy, energy histograms and samples of the averaged weights, on held-out training images."""

    def __init__(self, preset: Preset, data: Dataset, device: torch.device, n: int = 500) -> None:
        self.preset, self.device = preset, device
        split = data.selection.first(n)
        self.image, self.label = to_float(to_device(split.image, device)), torch.from_numpy(split.label).to(device)
        classes = len(data.names)
        self.drawn = torch.arange(2 * min(classes, 10), device=device) % min(classes, 10)
        shape = (3, *data.train.image.shape[1:3])
        self.starts = Starts(fit_prior(data.train, classes, preset.prior_rank), shape, device)

    def look(self, ema: dict[str, Tensor]) -> tuple[dict[str, Any], pixels.Pixels]:
        """Return the figures, with histograms of E(x) of clean, adversarial and drawn images, and a sheet of samples."""
        p = self.preset
        model = WideResNet(p.depth, p.width, ema["head.weight"].shape[0]).to(self.device)
        model.load_state_dict(ema)
        model.autocast = precision(p, self.device)
        model.eval().requires_grad_(False)
        noise = Noise.seeded(0, self.device)
        pairs = zip(torch.split(self.image, 100), torch.split(self.label, 100), strict=True)  # large images would not fit at once
        x_adv = torch.cat(
            [pgd(model, x, y, objective=cross_entropy, threat=p.threat, attack=Attack(steps=10), noise=noise) for x, y in pairs]
        )
        start = self.starts.draw(self.drawn, noise)
        drawn = sgld(lambda x: score(model, x, self.drawn)[0], start, lambda: noise.normal(*start.shape), p.sample)
        with torch.no_grad():
            logits, logits_adv, logits_drawn = (
                torch.cat([model(part) for part in torch.split(x, 100)]) for x in (self.image, x_adv, drawn)
            )
        energies = {name: energy(f).cpu().numpy() for name, f in (("clean", logits), ("adversarial", logits_adv), ("drawn", logits_drawn))}
        row = {
            "selection_clean": float((logits.argmax(dim=1) == self.label).float().mean()),
            "selection_pgd10": float((logits_adv.argmax(dim=1) == self.label).float().mean()),
            "selection_gap_over_sd": float(abs((energies["adversarial"] - energies["clean"]).mean()) / max(energies["clean"].std(), 1e-9)),
            "histograms": histograms(energies),
        }
        picture = pixels.to_bytes(drawn.cpu().numpy())
        return row, pixels.grid(picture, max(1, 96 // picture.shape[1]), columns=len(self.drawn) // 2)


def histograms(energies: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the range of all energies, nats, and each set's share per bin."""
    finite = np.concatenate([values[np.isfinite(values)] for values in energies.values()])
    if not len(finite):
        return {}
    low, high = float(finite.min()), float(finite.max()) + 1e-6
    counts = {
        name: np.histogram(values[np.isfinite(values)], BINS, (low, high))[0] / max(1, len(values)) for name, values in energies.items()
    }
    return {"range": [round(low, 4), round(high, 4)], **{name: [round(float(c), 4) for c in count] for name, count in counts.items()}}


def read(terms: Terms, length: Tensor, ranks: Ranks) -> Row:
    """Return loss, log and the gradient's length as numbers, averaged over the ranks, with one transfer from the device."""
    names = ["loss", *terms.log, "gradient"]
    values = torch.stack([terms.loss.detach().float(), *(value.float().to(terms.loss.device) for value in (*terms.log.values(), length))])
    return dict(zip(names, ranks.mean(values).tolist(), strict=True))


def diverged(row: Row, preset: Preset, saturation: float) -> bool:
    """Return whether a loss is not finite, the energy gap left its limit, or the chains sit on the box more than data do."""
    return (
        not all(math.isfinite(value) for value in row.values())
        or abs(row.get("energy_gap_neg", 0.0)) > preset.energy_gap_limit
        or row.get("saturation", 0.0) - saturation > preset.saturation_limit
    )


def roll_back(state: State, saved: Path, watch: RunLogger, row: Row, most: int) -> None:
    """Return to the last saved state with another random stream and half the rate, and count it.

    Raises TrainingDiverged when that happened ``most`` times before, or nothing was saved yet.
    """
    rollbacks = state.rollbacks + 1
    watch.write({"step": state.step, "diverged": rollbacks, **row})
    if rollbacks > most or not saved.is_file():
        raise TrainingDiverged(f"diverged {rollbacks} times, last at step {state.step}: {row}; lower lr or w1, or raise energy_penalty")
    # a state that was already on its way out when it was saved sends the run back once more, to the one before
    before = previous(saved)
    state.restore(before if state.fell_back and before.is_file() else saved)
    state.noise.ranks.wait()
    state.fell_back = True
    state.rollbacks = rollbacks
    state.lr_scale *= 0.5
    state.noise.generator.manual_seed(1000 * rollbacks + state.step)
    state.save(saved, keep=False)
