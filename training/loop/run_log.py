"""The log of a run: log.jsonl, one progress line, sample sheets, and TensorBoard on request."""

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebjdat_serve import pixels
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.install import install
from training.config import Preset
from training.distributed import Ranks
from training.loop.clock import duration
from training.methods import Terms

Row = dict[str, float]
EVERY = 60.0
"""Seconds between progress lines without a terminal."""
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
        self.last_line = self.began
        self.bar = progress_bar(preset.name, total, step) if writes else None
        self.board = summary_writer(folder) if tensorboard and writes else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one line to the log, and show how far the stage is."""
        if not self.writes:
            return
        shown = {name: rounded(value) for name, value in row.items()}
        line = json.dumps(shown, allow_nan=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        log.debug("%s", self.name, extra={"fields": {name: value for name, value in shown.items() if name != "histograms"}})
        self.last |= row
        if self.bar is None:
            self.print_progress()
        else:
            self.bar.n = row["step"]
            self.bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "accuracy_adv", "selection_pgd10") if name in row})
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "of") and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])

    def print_progress(self) -> None:
        """Log the stage's progress once a minute if there is no progress bar."""
        now = time.monotonic()
        if now - self.last_line < EVERY or self.last["step"] <= self.first:
            return
        self.last_line, done = now, self.last["step"] - self.first
        left = (now - self.began) * (self.total - self.last["step"]) / done
        log.info("%s: step %d of %d, about %s left%s", self.name, self.last["step"], self.total, duration(left), self.figures())

    def figures(self) -> str:
        """Return the accuracies of the last validation in words."""
        shown = {"clean": "selection_clean", "PGD-10": "selection_pgd10"}
        found = [f"{name} {self.last[key]:.3f}" for name, key in shown.items() if key in self.last]
        return f"; {', '.join(found)} of held-out training images" if found else ""

    def write_samples(self, step: int, grid: pixels.Pixels) -> None:
        """Write a sheet of samples."""
        if not self.writes:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        (self.folder / "samples" / f"{step:07d}.png").write_bytes(pixels.encode_png(grid, generated=True))
        if self.board is not None:
            self.board.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """Close the progress bar and TensorBoard's file, and log the final figures."""
        if self.writes:
            took = duration(time.monotonic() - self.began)
            log.info("%s: %d of %d steps in %s%s", self.name, self.last["step"], self.total, took, self.figures())
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def rounded(value: Any) -> Any:
    """Return a number for the log; as a string if it is not finite, which JSON cannot represent."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else str(value)


def progress_bar(name: str, total: int, step: int) -> Any:
    """Return a tqdm bar on a terminal where tqdm is installed, else None."""
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


def scalars(terms: Terms, gradient_norm: Tensor, ranks: Ranks, *flags: bool) -> tuple[Row, list[bool]]:
    """Return loss, log and the gradient's norm as numbers, averaged over the ranks, and whether each flag is set on any of them.

    One collective, and one transfer from the device, which the host waits for.
    """
    names, device = ["loss", *terms.log, "gradient"], terms.loss.device
    values = torch.stack([alike(value, device) for value in (terms.loss.detach(), *terms.log.values(), gradient_norm)])
    if ranks.world == 1:
        return dict(zip(names, values.tolist(), strict=True)), list(flags)
    everything = ranks.mean(torch.cat([values, torch.tensor(flags, dtype=torch.float32, device=device)])).tolist()
    return dict(zip(names, everything, strict=False)), [share > 0 for share in everything[len(names) :]]


def alike(value: Tensor, device: torch.device) -> Tensor:
    """Return a scalar in float32 on the device."""
    return value if value.dtype == torch.float32 and value.device == device else value.float().to(device)
