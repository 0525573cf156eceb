"""EB-JDAT (arXiv 2505.19459): log p(x, x_adv, y) = log p(x) + log p(x_adv|x) + log p(y|x, x_adv), term by term."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.energy import energy, joint_energy
from training.methods import Batch, Method, RunContext, StepContext, Terms, accuracy, detached, forward
from training.methods.adversary import INNER, Attack, Classifier, Objective, cross_entropy, divergence, frozen, together
from training.methods.at import divergence_from, objective_search
from training.methods.jem import blurred, energy_log, generative, penalty, ramp, start_chains
from training.methods.replay import ChainConfig, ReplayBuffer

ALIGNMENTS = ("relative", "mean", "absolute", "paper", "kl", "released")


def alignment(energy_x: Tensor, energy_adv: Tensor, kind: str) -> Tensor:
    """Return -h2, the gap between the energies of the same images, (N,) each, clean and adversarial.

    ``paper``     mean E(x_adv) - mean E(x): unbounded below once x_adv does not maximise the energy itself
    ``mean``      |mean E(x_adv) - mean E(x)|: the same two sums, whichever way the gap points
    ``absolute``  mean |E(x_adv) - E(x)|, image by image
    ``relative``  |mean E(x_adv) - mean E(x)| / sd E(x): the only one that shrinking all logits does not lower,
                  which is what training does with the others (docs/decisions/0001)
    """
    gap = energy_adv - energy_x
    match kind:
        case "relative":
            return gap.mean().abs() / energy_x.std()
        case "mean":
            return gap.mean().abs()
        case "absolute":
            return gap.abs().mean()
        case "paper":
            return gap.mean()
    raise ValueError(f"alignment must be relative, mean, absolute or paper, not {kind!r}")


def classification(logits: Tensor, logits_adv: Tensor, label: Tensor, clean_weight: float) -> Tensor:
    """Return -h3: cross-entropy on the clean and the adversarial image, weighted to sum to one."""
    clean, adversarial = cross_entropy(logits, label).mean(), cross_entropy(logits_adv, label).mean()
    return clean_weight * clean + (1 - clean_weight) * adversarial


def released_objective(network: Classifier, image: Tensor) -> Objective:
    """Return what the released code's adversary raises: f(x_adv)[y] + ||f(x)/||f(x)|| - f(x_adv)/||f(x_adv)|| ||^2, f(x) held constant."""
    with torch.no_grad():
        direction = F.normalize(network(image), dim=1)

    def objective(logits_adv: Tensor, label: Tensor) -> Tensor:
        turn = (direction - F.normalize(logits_adv, dim=1)).square().sum(dim=1)
        return turn - joint_energy(logits_adv, label)

    return objective


@dataclass(frozen=True)
class EbJdat(Method[ReplayBuffer]):
    """min -(w1 h1 + w2 h2 + w3 h3) with x_adv raising ``inner`` (ce | energy | joint_energy) and x_neg from ``chains``."""

    w1: float = 0.3
    w2: float = 2.0
    w3: float = 1.0
    w1_ramp: float = 0.1  # fraction of the run over which w1 rises from 0
    alignment: str = "relative"
    clean_weight: float = 0.3  # share of the clean image in h3
    energy_penalty: float = 0.002
    data_noise: float = 0.015  # on the images whose likelihood is raised
    inner: str = "ce"  # objective of the inner maximisation; kl: KL(p || q), as in TRADES; released: that of the released code
    attack: Attack = Attack(steps=5)
    chains: ChainConfig = ChainConfig(conditional=True, noise_std=0.005)

    def __post_init__(self) -> None:
        inners = (*INNER, "kl", "released")
        if self.alignment not in ALIGNMENTS or self.inner not in inners:
            raise ValueError(
                f"alignment is one of {', '.join(ALIGNMENTS)}, inner of {', '.join(inners)}: not {self.alignment}, {self.inner}"
            )

    def begin(self, context: RunContext) -> ReplayBuffer:
        return start_chains(self.chains, context)

    def solve(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Batch:
        """Add x_adv and x_neg, and Gaussian noise to the p(x) stream."""
        with frozen(model) as network:
            objective, projected = self.objective(network, batch.image), self.inner != "released"  # whose code leaves the ball
            search = objective_search(batch, objective, self.attack, context, projected=projected)
            x_adv, x_neg = together(network, search, state.walk(context.noise))
        return replace(batch, x_adv=x_adv, x_neg=x_neg, plain=blurred(batch.plain, self.data_noise, context))

    def objective(self, network: Classifier, image: Tensor) -> Objective:
        """Return what the adversary raises."""
        of_image = {"kl": divergence_from, "released": released_objective}
        return of_image[self.inner](network, image) if self.inner in of_image else INNER[self.inner]

    def loss(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Terms:
        label = batch.label
        logits, logits_adv, logits_plain, logits_neg = forward(model, batch.image, batch.x_adv, batch.plain, batch.x_neg)
        energy_x, energy_adv = energy(logits), energy(logits_adv)
        energy_plain, energy_neg = energy(logits_plain), energy(logits_neg)

        h1 = generative(energy_plain, energy_neg)
        if self.alignment == "kl":  # TRADES aligns E(x) and E(x_adv) by itself (arXiv 2407.06315)
            h2 = divergence(logits, logits_adv).mean()
        elif self.alignment == "released":  # raises E(x_adv), the sign opposite to the paper's; of other images than x_adv's
            h2 = generative(energy_plain, energy_adv)
        else:  # of the whole batch: a quotient of its statistics is no mean over ranks
            everyone = context.ranks.everywhere(energy_x, energy_adv)
            h2 = alignment(everyone[0], everyone[1], self.alignment)
        h3 = classification(logits, logits_adv, label, self.clean_weight)
        loss = ramp(self.w1, self.w1_ramp, context) * h1 + self.w2 * h2 + self.w3 * h3
        loss = loss + self.energy_penalty * penalty(energy_plain, energy_neg)

        return detached(
            loss,
            h2=h2,
            h3=h3,
            energy_gap_adv=(energy_adv - energy_x).mean(),
            accuracy=accuracy(logits, label),
            accuracy_adv=accuracy(logits_adv, label),
            **energy_log(energy_plain, energy_neg, state),
        )
