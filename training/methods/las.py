"""LAS-AT (Jia et al., arXiv 2203.06616): a strategy network chooses each image's attack, and is rewarded by its effect on training.

After the released code: eps, steps and step size are categorical choices of the strategy network per image, sampled; every
``interval`` steps it takes one REINFORCE step on a reward of the whole batch. The strategy network here is a small one of ours, not a
ResNet-18, and the look-ahead's rate is a number of its own.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.networks import Network, Plain
from training.methods import Batch, Method, RunContext, StepContext, Terms, accuracy, detached
from training.methods.adversary import Attack, Threat, ascent, begin, cross_entropy, frozen, norm
from training.methods.at import cross_entropy_adversary


@dataclass
class Strategy:
    """The strategy network, the sizes of its heads, and the number of steps taken."""

    network: Network
    heads: list[int]
    steps: int = 0

    def log_probabilities(self, image: Tensor) -> list[Tensor]:
        """Return log pi(. | x) of each head, (N, options) each."""
        return [F.log_softmax(part, dim=1) for part in self.network(image).split(self.heads, dim=1)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps), **{f"strategy.{name}": value for name, value in self.network.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        weights = {name.removeprefix("strategy."): value for name, value in state.items() if name.startswith("strategy.")}
        self.network.load_state_dict(weights)


@dataclass(frozen=True)
class LasAt(Method[Strategy]):
    """min_theta max_pi E CE_smooth(f(x_adv(pi)), y), the strategy pi rewarded by R = CE(x_adv) + robust + clean accuracy afterwards.

    Lengths in eighths of the threat's eps, as the paper's grid is of 8/255.
    """

    eps: tuple[int, int] = (3, 15)
    steps: tuple[int, int] = (3, 14)
    step: tuple[int, int] = (1, 5)
    smoothing: float = 0.3  # of the labels in the outer loss
    interval: int = 20
    strategy_lr: float = 1e-4
    lookahead_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError("interval must be 1 or more")

    def begin(self, context: RunContext) -> Strategy:
        """Return a fresh strategy network, the same on every rank."""
        heads = [high - low + 1 for low, high in (self.eps, self.steps, self.step)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.noise.generator.initial_seed())
            network = Plain(10, 1).build(sum(heads))
        return Strategy(network.to(context.device).eval(), heads)

    def solve(self, model: nn.Module, batch: Batch, state: Strategy, context: StepContext) -> Batch:
        """Add x_adv, by a sampled attack for each image; every ``interval`` steps update the strategy first."""
        if state.steps % self.interval == 0:
            self.improve(model, batch, state, context)
        state.steps += 1
        with torch.no_grad():
            choice = self.choose(state.log_probabilities(batch.image), context)
        return replace(batch, x_adv=self.attacked(model, batch, choice, context))

    def loss(self, model: nn.Module, batch: Batch, state: Strategy, context: StepContext) -> Terms:
        logits_adv = model(batch.x_adv)
        return detached(self.smoothed(logits_adv, batch.label), accuracy_adv=accuracy(logits_adv, batch.label))

    def smoothed(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the cross-entropy with weight 1 - smoothing on the label and the rest spread over the other classes."""
        classes = logits.shape[1]
        # torch's smoothing shares among all classes, the label too
        return F.cross_entropy(logits, label, label_smoothing=self.smoothing * classes / (classes - 1))

    def choose(self, log_pi: list[Tensor], context: StepContext) -> list[Tensor]:
        """Return one sampled option per head and image, by the Gumbel trick, so that the run's own noise decides."""
        return [(p - torch.log(-torch.log(context.noise.uniform(*p.shape).clamp(1e-7, 1 - 1e-7)))).argmax(dim=1) for p in log_pi]

    def attacked(self, model: nn.Module, batch: Batch, choice: list[Tensor], context: StepContext) -> Tensor:
        """Return x_adv: sign (or l2) ascents of the cross-entropy, image i with its own radius, number and length of steps."""
        unit = context.threat.eps / 8
        eps, steps, step = (option + low for option, (low, _) in zip(choice, (self.eps, self.steps, self.step), strict=True))
        with frozen(model) as network:
            x = begin(batch.image, context.threat, "uniform", context.noise)
            for t in range(self.steps[1]):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(cross_entropy(network(x).float(), batch.label).sum(), x)
                length = (unit * step * (t < steps))[:, None, None, None]
                x = x.detach() + length * ascent(gradient, context.threat.norm)
                x = self.within(x, batch.image, unit * eps, context.threat)
        return x.detach()

    def within(self, x: Tensor, image: Tensor, eps: Tensor, threat: Threat) -> Tensor:
        """Return ``x`` projected into each image's own ball, eps (N,), and [0,1]."""
        radius, delta = eps[:, None, None, None], x - image
        if threat.norm == "linf":
            return (image + torch.maximum(torch.minimum(delta, radius), -radius)).clamp(0.0, 1.0)
        return (image + delta * (radius / norm(delta).clamp_min(1e-12)).clamp(max=1.0)).clamp(0.0, 1.0)

    def improve(self, model: nn.Module, batch: Batch, state: Strategy, context: StepContext) -> None:
        """Take one REINFORCE step: theta_pi += lr R grad sum over heads of mean log pi(a | x), gradient norm at most 1."""
        state.network.train()
        log_pi = state.log_probabilities(batch.image)
        choice = self.choose([p.detach() for p in log_pi], context)
        reward = context.ranks.mean(self.reward(model, batch, self.attacked(model, batch, choice, context), context))
        chosen = [p.gather(1, a[:, None]).mean() for p, a in zip(log_pi, choice, strict=True)]
        weights = list(state.network.parameters())
        gradient = [context.ranks.mean(g) for g in torch.autograd.grad(torch.stack(chosen).sum() * reward, weights)]
        length = torch.stack([g.norm() for g in gradient]).norm()
        with torch.no_grad():
            for w, g in zip(weights, gradient, strict=True):
                w.add_(self.strategy_lr * g * (1.0 / length.clamp_min(1.0)))
        for statistic in state.network.buffers():
            if statistic.is_floating_point():
                statistic.copy_(context.ranks.mean(statistic))  # every rank saw its own images
        state.network.eval()

    def reward(self, model: nn.Module, batch: Batch, x_adv: Tensor, context: StepContext) -> Tensor:
        """Return R = min(CE(x_adv), 10) + 4 robust accuracy + 2 clean accuracy, the two of a copy that took one step on x_adv."""
        with frozen(model) as network, torch.no_grad():
            difficulty = cross_entropy(network(x_adv), batch.label).mean().clamp(0.0, 10.0)
        ahead = deepcopy(model)
        weights = [w for w in ahead.parameters() if w.requires_grad]
        gradient = torch.autograd.grad(self.smoothed(ahead(x_adv), batch.label), weights)
        with torch.no_grad():
            for w, g in zip(weights, gradient, strict=True):
                w.sub_(self.lookahead_lr * g)
        x_new = cross_entropy_adversary(ahead, batch, Attack(steps=10), context)
        with frozen(ahead) as network, torch.no_grad():
            robust, clean = accuracy(network(x_new), batch.label), accuracy(network(batch.image), batch.label)
        return difficulty + 4.0 * robust + 2.0 * clean
