"""Validation during training: accuracy, energy histograms and samples of the averaged weights, on held-out training images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebjdat_serve import pixels
from ebjdat_serve.energy import energy, score
from ebjdat_serve.sgld import sgld
from training.config import Preset
from training.data.augment import to_device, to_float
from training.data.datasets import Dataset
from training.distributed import Noise
from training.loop.start import precision
from training.methods.adversary import Attack, cross_entropy, pgd
from training.methods.passes import Passes
from training.methods.replay import Starts, prior_of

BINS = 48


class Validator:
    """Clean and PGD-10 accuracy, energy histograms and samples of the averaged weights, on the first ``n`` selection images."""

    def __init__(self, preset: Preset, data: Dataset, device: torch.device, n: int = 500) -> None:
        self.preset, self.device = preset, device
        split = data.selection.first(n)
        self.image, self.label = to_float(to_device(split.image, device)), torch.from_numpy(split.label).to(device)
        shown = min(len(data.names), 10)
        self.drawn = torch.arange(2 * shown, device=device) % shown  # two samples of each class on the sheet
        self.starts = Starts(prior_of(data, preset.prior_rank), (3, *data.size), device)
        self.model = preset.architecture.build(len(data.names)).to(device)
        self.model.autocast = precision(preset, device)
        self.model.eval().requires_grad_(False)

    def validate(self, weights: dict[str, Tensor]) -> tuple[dict[str, Any], pixels.Pixels]:
        """Return the figures, with histograms of E(x) of clean, adversarial and drawn images, and a sheet of samples."""
        p, model = self.preset, self.model
        model.load_state_dict(weights)
        noise = Noise.seeded(0, self.device)
        pairs = zip(torch.split(self.image, 100), torch.split(self.label, 100), strict=True)  # large images would not fit at once
        x_adv = torch.cat(
            [pgd(model, x, y, objective=cross_entropy, threat=p.threat, attack=Attack(steps=10), noise=noise) for x, y in pairs]
        )
        Passes.drop(model)  # or they would lie beside those of training for the rest of its stage
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
        samples = pixels.to_bytes(drawn.cpu().numpy())
        return row, pixels.grid(samples, max(1, 96 // samples.shape[1]), columns=len(self.drawn) // 2)


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
