"""EB-JDAT (arXiv 2505.19459): log p(x, x_adv, y) = log p(x) + log p(x_adv|x) + log p(y|x, x_adv), term by term."""

import torch
from torch import Tensor

from ebjdat_serve.energy import energy
from ebjdat_serve.sgld import Prior, Sampler
from ebjdat_serve.wideresnet import WideResNet
from training.adversary import INNER, cross_entropy, pgd
from training.methods import Batch, Terms
from training.presets import Preset
from training.replay import ReplayBuffer


def generative(energy_x: Tensor, energy_neg: Tensor) -> Tensor:
    """Return -h1: mean E(x) - mean E(x_neg), whose gradient estimates that of -log p(x); x_neg is constant.

    The chains follow dE(x,y)/dx for y uniform, so that blocks of the buffer stay of one class: the estimate takes the
    model's p(y) for uniform, where the lineage's default samples the marginal.
    """
    return energy_x.mean() - energy_neg.mean()


def alignment(energy_x: Tensor, energy_adv: Tensor, kind: str) -> Tensor:
    """Return -h2, the gap between the energies of the same images, (N,) each, clean and adversarial.

    ``paper``     mean E(x_adv) - mean E(x): unbounded below once x_adv does not maximise the energy itself
    ``mean``      |mean E(x_adv) - mean E(x)|: the same two sums, whichever way the gap points
    ``paired``    mean |E(x_adv) - E(x)|
    ``relative``  |mean E(x_adv) - mean E(x)| / sd E(x): the only one that shrinking all logits does not lower,
                  which is what training does with the others (docs/decisions/0001)
    """
    gap = energy_adv - energy_x
    match kind:
        case "relative":
            return gap.mean().abs() / energy_x.std()
        case "mean":
            return gap.mean().abs()
        case "paired":
            return gap.abs().mean()
        case "paper":
            return gap.mean()
    raise ValueError(f"alignment must be relative, mean, paired or paper, not {kind!r}")


def classification(logits: Tensor, logits_adv: Tensor, label: Tensor, clean_weight: float) -> Tensor:
    """Return -h3: cross-entropy on the clean and the adversarial image, weighted to sum to one."""
    clean, adversarial = cross_entropy(logits, label).mean(), cross_entropy(logits_adv, label).mean()
    return clean_weight * clean + (1 - clean_weight) * adversarial


class EbJdat:
    """w1 h1 + w2 h2 + w3 h3 with one concatenated forward; batch norm as the preset says."""

    def __init__(self, preset: Preset, prior: Prior, device: torch.device) -> None:
        self.preset = preset
        self.buffer = ReplayBuffer(prior, preset.buffer_size, preset.reinit, preset.seed, device)
        self.sampler = Sampler(preset.chain_steps, preset.chain_step_size, preset.chain_clip, preset.chain_noise)

    def terms(self, model: WideResNet, batch: Batch, generator: torch.Generator, progress: float) -> Terms:
        """Return the loss of one step and what to log of it."""
        p, x, label = self.preset, batch.image, batch.label
        x_adv = pgd(
            model, x, label, objective=INNER[p.inner], eps=p.eps, step_size=p.attack_step_size, steps=p.attack_steps, generator=generator
        )
        x_neg = self.buffer.advance(model, p.chain_batch, self.sampler, generator)
        noise = torch.randn(batch.plain.shape, generator=generator, device=x.device)
        x_plain = (batch.plain + p.data_noise * noise).clamp(0.0, 1.0)

        logits, logits_adv, logits_plain, logits_neg = model(torch.cat([x, x_adv, x_plain, x_neg])).split(
            [len(x), len(x), len(x_plain), len(x_neg)]
        )
        energy_x, energy_adv = energy(logits), energy(logits_adv)
        energy_plain, energy_neg = energy(logits_plain), energy(logits_neg)

        w1 = p.w1 * min(1.0, progress / p.w1_ramp) if p.w1_ramp else p.w1
        h1 = generative(energy_plain, energy_neg)
        h2 = alignment(energy_x, energy_adv, p.alignment)
        h3 = classification(logits, logits_adv, label, p.clean_weight)
        penalty = energy_plain.square().mean() + energy_neg.square().mean()
        loss = w1 * h1 + p.w2 * h2 + p.w3 * h3 + p.energy_penalty * penalty

        log = {
            "energy": energy_plain.mean(),
            "energy_sd": energy_plain.std(),
            "energy_gap_neg": energy_neg.mean() - energy_plain.mean(),
            "energy_gap_adv": (energy_adv - energy_x).mean(),
            "h2": h2,
            "h3": h3,
            "accuracy": (logits.argmax(dim=1) == label).float().mean(),
            "accuracy_adv": (logits_adv.argmax(dim=1) == label).float().mean(),
            "saturation": self.buffer.saturation(),
        }
        return Terms(loss, {name: value.detach() for name, value in log.items()})

    def state(self) -> dict[str, Tensor]:
        """Return the chains."""
        return {"chain": self.buffer.chain}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the chains back."""
        self.buffer.chain.copy_(state["chain"])
