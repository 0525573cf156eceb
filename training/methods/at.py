"""Training against an adversary of p(y|x): no defence, PGD-AT and FGSM-RS, TRADES, MART, WEAT.

With p = softmax f(x), q = softmax f(x_adv), and x_adv in the ball around x. AWP is a way to take the step of any of them:
training/methods/sharpness.py.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.energy import energy
from training.methods import Batch, NoState, Stateless, StepContext, Terms, accuracy, detached, forward
from training.methods.adversary import Attack, Classifier, Objective, Search, attacking, cross_entropy, divergence, frozen, together


@dataclass(frozen=True)
class Standard(Stateless):
    """min CE(f(x), y): no defence."""

    def loss(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Terms:
        logits = model(batch.image)
        return detached(cross_entropy(logits, batch.label).mean(), accuracy=accuracy(logits, batch.label))


@dataclass(frozen=True)
class AdversarialTraining(Stateless):
    """min E max CE(f(x_adv), y) (Madry et al., arXiv 1706.06083); one step of 1.25 eps is FGSM-RS (Wong et al., arXiv 2001.03994)."""

    attack: Attack = Attack()

    def solve(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Batch:
        return replace(batch, x_adv=cross_entropy_adversary(model, batch, self.attack, context))

    def loss(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Terms:
        logits_adv = model(batch.x_adv)
        return detached(cross_entropy(logits_adv, batch.label).mean(), accuracy_adv=accuracy(logits_adv, batch.label))


@dataclass(frozen=True)
class Trades(Stateless):
    """min CE(f(x), y) + beta KL(p || q), x_adv raising the KL (Zhang et al., arXiv 1901.08573)."""

    beta: float = 6.0
    attack: Attack = Attack(start="gaussian")

    def solve(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Batch:
        """Add x_adv, which raises KL(p || q); at x itself its gradient is zero, hence the gaussian start."""
        return replace(batch, x_adv=divergence_adversary(model, batch, self.attack, context))

    def loss(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Terms:
        """Return CE(f(x), y) + beta KL(p || q); neither side is held constant."""
        logits, logits_adv = forward(model, batch.image, batch.x_adv)
        ce, kl = trades(logits, logits_adv, batch.label)
        return detached(ce + self.beta * kl, ce=ce, kl=kl, **accuracies(logits, logits_adv, batch.label))


@dataclass(frozen=True)
class Mart(Stateless):
    """min BCE(q, y) + beta KL(p || q) (1 - p_y): misclassified images weigh more (Wang et al., ICLR 2020)."""

    beta: float = 5.0
    attack: Attack = Attack()

    def solve(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Batch:
        return replace(batch, x_adv=cross_entropy_adversary(model, batch, self.attack, context))

    def loss(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Terms:
        logits, logits_adv = forward(model, batch.image, batch.x_adv)
        bce, kl = mart(logits, logits_adv, batch.label)
        return detached(bce + self.beta * kl, bce=bce, kl=kl, **accuracies(logits, logits_adv, batch.label))


@dataclass(frozen=True)
class Weat(Stateless):
    """min w CE(f(x), y) + beta w KL(p || q), w = 1 / log(1 + e^|E(x)|): high energies weigh more (Mirza et al., ECCV 2024).

    ``adversarial``: the cross-entropy is that of x_adv.
    """

    beta: float = 6.0
    adversarial: bool = False
    attack: Attack = Attack(start="gaussian")

    def solve(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Batch:
        return replace(batch, x_adv=divergence_adversary(model, batch, self.attack, context))

    def loss(self, model: nn.Module, batch: Batch, state: NoState, context: StepContext) -> Terms:
        logits, logits_adv = forward(model, batch.image, batch.x_adv)
        ce, kl = weat(logits, logits_adv, batch.label, adversarial=self.adversarial)
        return detached(ce + self.beta * kl, ce=ce, kl=kl, energy=energy(logits).mean(), **accuracies(logits, logits_adv, batch.label))


def trades(logits: Tensor, logits_adv: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean CE(f(x), y) and mean KL(p || q)."""
    return cross_entropy(logits, label).mean(), divergence(logits, logits_adv).mean()


def mart(logits: Tensor, logits_adv: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [-log q_y - log(1 - max_{k != y} q_k)] and mean KL(p || q) (1 - p_y).

    The guards 1.0001 and 1e-12 are the released code's.
    """
    p, q = F.softmax(logits, dim=1), F.softmax(logits_adv, dim=1)
    rival = q.scatter(1, label[:, None], -1.0).max(dim=1).values
    bce = cross_entropy(logits_adv, label) - torch.log(1.0001 - rival + 1e-12)
    kl = (p * (F.log_softmax(logits, dim=1) - torch.log(q + 1e-12))).sum(dim=1)
    p_y = p.gather(1, label[:, None]).squeeze(1)
    return bce.mean(), (kl * (1.0000001 - p_y)).mean()


def weat(logits: Tensor, logits_adv: Tensor, label: Tensor, *, adversarial: bool) -> tuple[Tensor, Tensor]:
    """Return mean w CE and mean w KL(p || q), w = 1 / softplus |E(x)| held constant."""
    weight = 1.0 / F.softplus(energy(logits).detach().abs())
    ce = cross_entropy(logits_adv if adversarial else logits, label)
    return (weight * ce).mean(), (weight * divergence(logits, logits_adv)).mean()


def cross_entropy_adversary(model: nn.Module, batch: Batch, attack: Attack, context: StepContext) -> Tensor:
    """Return x_adv that raises CE(f(x_adv), y)."""
    return objective_adversary(model, batch, cross_entropy, attack, context)


def divergence_adversary(model: nn.Module, batch: Batch, attack: Attack, context: StepContext) -> Tensor:
    """Return x_adv that raises KL(p || q), p held at the clean image."""
    with frozen(model) as network:
        (x_adv,) = together(network, objective_search(batch, divergence_from(network, batch.image), attack, context))
    return x_adv


def divergence_from(network: Classifier, image: Tensor) -> Objective:
    """Return KL(p || q) as an objective, p of ``image`` held constant."""
    with torch.no_grad():
        logits = network(image)
    return lambda logits_adv, _: divergence(logits, logits_adv)


def objective_adversary(model: nn.Module, batch: Batch, objective: Objective, attack: Attack, context: StepContext) -> Tensor:
    """Return x_adv in the ball that raises ``objective``."""
    with frozen(model) as network:
        (x_adv,) = together(network, objective_search(batch, objective, attack, context))
    return x_adv


def objective_search(batch: Batch, objective: Objective, attack: Attack, context: StepContext, *, projected: bool = True) -> Search:
    """Return the inner loop to x_adv that raises ``objective``, in the ball unless not ``projected``."""
    threat, noise = context.threat, context.noise
    return attacking(batch.image, batch.label, objective=objective, threat=threat, attack=attack, noise=noise, projected=projected)


def accuracies(logits: Tensor, logits_adv: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Return the batch's clean and adversarial accuracy for the log."""
    return {"accuracy": accuracy(logits, label), "accuracy_adv": accuracy(logits_adv, label)}
