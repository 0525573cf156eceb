"""Adversarial training of p(y|x): FGSM with a random start (Wong et al., arXiv 2001.03994), or PGD with more steps."""

import torch
from torch import Tensor

from ebjdat_serve.wideresnet import WideResNet
from training.adversary import cross_entropy, pgd
from training.methods import Batch, Terms
from training.presets import Preset


class AdversarialTraining:
    """min_theta E max_{|x_adv - x| <= eps} CE(f(x_adv), y); one step of 1.25 eps is FGSM-RS."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    def terms(self, model: WideResNet, batch: Batch, generator: torch.Generator, progress: float) -> Terms:
        """Return the loss of one step and what to log of it."""
        p = self.preset
        x_adv = pgd(
            model,
            batch.image,
            batch.label,
            objective=cross_entropy,
            eps=p.eps,
            step_size=p.attack_step_size,
            steps=p.attack_steps,
            generator=generator,
        )
        logits = model(x_adv)
        loss = cross_entropy(logits, batch.label).mean()
        accuracy = (logits.detach().argmax(dim=1) == batch.label).float().mean()
        return Terms(loss, {"ce_adv": loss.detach(), "accuracy_adv": accuracy})

    def state(self) -> dict[str, Tensor]:
        """Return nothing: this method keeps no state between steps."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
