"""Joint energy-based models: log p(x, y) = log p(x) + log p(y|x), with p(x) from E(x) = -logsumexp f(x) and negatives from SGLD.

JEM (Grathwohl et al., arXiv 1912.03263), JEM++ (Yang & Ji, arXiv 2109.09032) and SADA-JEM (Yang et al., arXiv 2209.07959)
are one loss with other chains, streams and steps: presets.py says which. JEAT puts x_adv where JEM has x.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from ebjdat_serve.energy import energy
from training.methods import Batch, Method, RunContext, StepContext, Terms, accuracy, detached, forward
from training.methods.adversary import INNER, Attack, cross_entropy, frozen, together
from training.methods.at import objective_search
from training.methods.replay import ChainConfig, ReplayBuffer, Starts, prior_of


def pyld(outer: int, inner: int, alpha: float, chains: ChainConfig) -> ChainConfig:
    """Return JEM++'s PYLD(M, N): M outer gradients, N inner steps of ``alpha`` in [-1,1] units, clipped at +-1.

    The network's first layer is affine, so the N inner steps share one gradient and equal one proximal step of N alpha:
    step_size N alpha / 4 and grad_clip 2 in [0,1] units (tests/test_identities.py proves it).
    """
    return replace(chains, steps=outer, step_size=inner * alpha / 4, grad_clip=2.0)


@dataclass(frozen=True)
class Jem(Method[ReplayBuffer]):
    """min CE(f(x), y) + w1 (mean E(x) - mean E(x_neg)) + energy_penalty (mean E(x)^2 + mean E(x_neg)^2)."""

    w1: float = 1.0
    w1_ramp: float = 0.1  # fraction of the run over which w1 rises from 0
    energy_penalty: float = 0.0
    data_noise: float = 0.015  # on the p(x) stream
    chains: ChainConfig = ChainConfig()

    def begin(self, context: RunContext) -> ReplayBuffer:
        return start_chains(self.chains, context)

    def solve(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Batch:
        """Add x_neg from the chains, and Gaussian noise to the p(x) stream."""
        return replace(batch, x_neg=state.advance(model, context.noise), plain=blurred(batch.plain, self.data_noise, context))

    def loss(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Terms:
        logits, logits_plain, logits_neg = forward(model, batch.image, batch.plain, batch.x_neg)
        energy_plain, energy_neg = energy(logits_plain), energy(logits_neg)
        ce = cross_entropy(logits, batch.label).mean()
        loss = ce + ramp(self.w1, self.w1_ramp, context) * generative(energy_plain, energy_neg)
        loss = loss + self.energy_penalty * penalty(energy_plain, energy_neg)
        log = energy_log(energy_plain, energy_neg, state)
        return detached(loss, ce=ce, accuracy=accuracy(logits, batch.label), **log)


@dataclass(frozen=True)
class Jeat(Method[ReplayBuffer]):
    """min CE(f(x_adv), y) + w1 (mean E(x_adv) - mean E(x_neg)), x_adv raising E(x, y) (after Zhu et al., arXiv 2108.09093).

    With w1 = 1 this is mean E(x_adv, y) - mean E(x_neg): JEM's model of p(x_adv, y). The authors released no code: the loss is
    from secondary descriptions, and its numbers are ours (docs/methods.md).
    """

    w1: float = 1.0
    w1_ramp: float = 0.1
    energy_penalty: float = 0.0
    inner: str = "joint_energy"
    attack: Attack = Attack(steps=1, step_over_eps=1.0)
    chains: ChainConfig = ChainConfig()

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ValueError(f"inner is one of {', '.join(INNER)}, not {self.inner!r}")

    def begin(self, context: RunContext) -> ReplayBuffer:
        return start_chains(self.chains, context)

    def solve(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Batch:
        with frozen(model) as network:
            search = objective_search(batch, INNER[self.inner], self.attack, context)
            x_adv, x_neg = together(network, search, state.walk(context.noise))
        return replace(batch, x_adv=x_adv, x_neg=x_neg)

    def loss(self, model: nn.Module, batch: Batch, state: ReplayBuffer, context: StepContext) -> Terms:
        logits_adv, logits_neg = forward(model, batch.x_adv, batch.x_neg)
        energy_adv, energy_neg = energy(logits_adv), energy(logits_neg)
        ce = cross_entropy(logits_adv, batch.label).mean()
        loss = ce + ramp(self.w1, self.w1_ramp, context) * generative(energy_adv, energy_neg)
        loss = loss + self.energy_penalty * penalty(energy_adv, energy_neg)
        log = energy_log(energy_adv, energy_neg, state)
        return detached(loss, ce_adv=ce, accuracy_adv=accuracy(logits_adv, batch.label), **log)


def generative(energy_x: Tensor, energy_neg: Tensor) -> Tensor:
    """Return mean E(x) - mean E(x_neg), whose gradient estimates that of -log p(x); x_neg is constant.

    Chains that follow dE(x,y)/dx for y uniform take the model's p(y) for uniform, where the lineage's default samples the marginal.
    """
    return energy_x.mean() - energy_neg.mean()


def penalty(energy_x: Tensor, energy_neg: Tensor) -> Tensor:
    """Return mean E(x)^2 + mean E(x_neg)^2, which keeps the energies from drifting: the likelihood does not see their level."""
    return energy_x.square().mean() + energy_neg.square().mean()


def ramp(weight: float, share: float, context: StepContext) -> float:
    """Return ``weight`` after a linear warm-up over the first ``share`` of the run: maximum likelihood from step 0 is unstable."""
    return weight * min(1.0, context.progress / share) if share else weight


def blurred(image: Tensor, sd: float, context: StepContext) -> Tensor:
    """Return the images plus Gaussian noise, clipped to [0,1]."""
    return (image + sd * context.noise.normal(*image.shape)).clamp(0.0, 1.0) if sd else image


def start_chains(chains: ChainConfig, context: RunContext) -> ReplayBuffer:
    """Return a replay buffer filled from the prior of ``chains``."""
    prior = prior_of(context.data, context.prior_rank) if chains.prior == "gaussian" else None
    starts = Starts(prior, context.image_shape, context.device)
    return ReplayBuffer(chains, starts, len(context.data.names), context.noise, context.device)


def energy_log(energy_x: Tensor, energy_neg: Tensor, buffer: ReplayBuffer) -> dict[str, Tensor]:
    """Return the energies of data and chains, and how far the chains have run, for the log."""
    gap = energy_neg.mean() - energy_x.mean()
    return {"energy": energy_x.mean(), "energy_sd": energy_x.std(), "energy_gap_neg": gap, "saturation": buffer.saturation()}
