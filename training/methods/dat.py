"""DAT, dual adversarial training (arXiv 2510.13872): adversarial training of p(y|x), and BCE on s(x) = logsumexp f(x) = -E(x).

Stage 2 continues an adversarially trained network with batch-norm statistics frozen: presets.py.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.energy import energy, joint_energy
from training.data.augment import to_device, to_float
from training.data.image_folders import load_images
from training.distributed import Noise
from training.errors import TrainingError
from training.methods import Batch, Method, RunContext, StepContext, Terms, accuracy, detached, forward
from training.methods.adversary import INNER, Attack, Threat, climb, cross_entropy, frozen
from training.methods.at import cross_entropy_adversary
from training.methods.curriculum import AucGate, auc
from training.methods.replay import Starts, prior_of


@dataclass(frozen=True)
class Seeds:
    """Starting points of the negatives, on the device: images of an OOD source, class Gaussians, or uniform noise."""

    pool: Tensor  # uint8 (M, 3, H, W), empty unless there is an OOD source
    starts: Starts
    classes: int

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        """Return one seed per label, (N, 3, H, W) in [0,1], of a random class: the label is the target of its ascent."""
        if len(self.pool):
            return to_float(self.pool[noise.integers(len(self.pool), len(label))])
        return self.starts.draw(noise.integers(self.classes, len(label)), noise)


@dataclass
class DatState:
    """The curriculum, which a checkpoint holds, and the seeds, which are drawn again."""

    gate: AucGate
    seeds: Seeds

    def state_dict(self) -> dict[str, Tensor]:
        return self.gate.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.gate.load_state_dict(state)


@dataclass(frozen=True)
class Dat(Method[DatState]):
    """min CE(f(x_adv), y) + bce_weight BCE(s), positives the p(x) stream, negatives T ascents of f(x)[y] from a seed.

    BCE(s) = 1/2 (mean softplus(-s(x)) + mean softplus(s(x_neg))), the released code's mean over both halves. Each negative takes the
    label of the data at its place, and steps x <- clip01(x + eta g / ||g||_2): no noise, no ball, no buffer.
    """

    bce_weight: float = 1.0
    attack: Attack = Attack(step_over_eps=0.2, start="image")
    eta: float = 0.1
    cap: int = 40
    auc_threshold: float = 0.8
    window: int = 1000
    patience: int = 0
    seeds: str = "gaussian"  # gaussian | noise | the path of an OOD source: a folder of images, an .npz, an image of tiles

    def __post_init__(self) -> None:
        if self.window < 1 or self.cap < 0 or not self.seeds:
            raise ValueError("window must be 1 or more, cap 0 or more, and seeds gaussian, noise or a path")

    def begin(self, context: RunContext) -> DatState:
        """Return the curriculum at T = 0 and the seeds."""
        shape = context.image_shape
        pool = torch.empty(0, dtype=torch.uint8)
        prior = None
        if self.seeds == "gaussian":
            prior = prior_of(context.data, context.prior_rank)
        elif self.seeds != "noise":
            pool = to_device(load_images(self.seeds, context.data.input), context.device)
            if not len(pool):
                raise TrainingError(f"seeds={self.seeds} holds no image")
        gate = AucGate(self.auc_threshold, self.cap, self.window, self.patience)
        return DatState(gate, Seeds(pool, Starts(prior, shape, context.device), len(context.data.names)))

    def solve(self, model: nn.Module, batch: Batch, state: DatState, context: StepContext) -> Batch:
        """Add x_adv, and x_neg unless ``bce_weight`` is zero; update the curriculum."""
        x_adv = cross_entropy_adversary(model, batch, self.attack, context)
        if not self.bce_weight:
            return replace(batch, x_adv=x_adv)
        label = batch.plain_label
        seeds = state.seeds.draw(label, context.noise)
        with frozen(model) as network:
            x_neg = climb(network, seeds, label, INNER["class_logit"], Threat("l2", torch.inf), state.gate.steps, self.eta)
            with torch.no_grad():
                score, score_neg = (-joint_energy(network(x), label) for x in (batch.plain, x_neg))
        area = float(auc(context.ranks.gather(score_neg), context.ranks.gather(score)))
        state.gate.update(area, len(label) * context.ranks.world)
        return replace(batch, x_adv=x_adv, x_neg=x_neg)

    def loss(self, model: nn.Module, batch: Batch, state: DatState, context: StepContext) -> Terms:
        if not self.bce_weight:
            logits_adv = model(batch.x_adv)
            return detached(cross_entropy(logits_adv, batch.label).mean(), accuracy_adv=accuracy(logits_adv, batch.label))
        logits_adv, logits_plain, logits_neg = forward(model, batch.x_adv, batch.plain, batch.x_neg)
        ce = cross_entropy(logits_adv, batch.label).mean()
        energy_plain, energy_neg = energy(logits_plain), energy(logits_neg)
        bce = support(energy_plain, energy_neg)
        return detached(
            ce + self.bce_weight * bce,
            ce_adv=ce,
            bce=bce,
            attack_steps=torch.tensor(float(state.gate.steps)),
            auc_energy=auc(-energy_neg, -energy_plain),
            energy=energy_plain.mean(),
            energy_sd=energy_plain.std(),
            energy_gap_neg=energy_neg.mean() - energy_plain.mean(),
            accuracy_adv=accuracy(logits_adv, batch.label),
        )


def support(energy_x: Tensor, energy_neg: Tensor) -> Tensor:
    """Return BCE with logit s = -E: 1/2 (mean softplus(E(x)) + mean softplus(-E(x_neg))).

    Its gradient is that of maximum likelihood with weights 1 - sigma(s(x)) and sigma(s(x_neg)), which vanish when both are told
    apart: energies stop growing. What is learned is the support of p(x), E = 0 on it.
    """
    return 0.5 * (F.softplus(energy_x).mean() + F.softplus(-energy_neg).mean())
