"""The class-informative prior and the replay buffer of persistent chains (JEM++, arXiv 2109.09032)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat_serve.energy import MARGINAL, logit_weights
from ebjdat_serve.sgld import Prior, Sampler, langevin_step
from training.data.datasets import Dataset
from training.data.image_folders import Split
from training.distributed import Noise
from training.errors import TrainingError
from training.methods.adversary import Ask, Search, frozen, together

SHARDS = 8
"""Parts of the buffer; a draw takes equally many chains of each, and a rank owns whole parts. So 1, 2, 4 or 8 ranks draw alike."""


@dataclass(frozen=True)
class ChainConfig:
    """The chains that draw the negatives of maximum likelihood; lengths in pixels of [0,1].

    ``prior`` gaussian (class-informative, JEM++) | uniform (JEM). ``conditional``: chains follow dE(x,y)/dx of their class, else
    the marginal dE(x)/dx. In [-1,1] units a step of 1 clipped at +-1 is step_size 0.25 and grad_clip 2 here.
    """

    batch: int = 64
    steps: int = 5
    step_size: float = 0.25
    grad_clip: float = 2.0
    noise_std: float = 0.0
    buffer_size: int = 10_000
    reinit: float = 0.05
    prior: str = "gaussian"
    conditional: bool = False

    def __post_init__(self) -> None:
        if self.prior not in ("gaussian", "uniform"):
            raise ValueError(f"prior must be gaussian or uniform, not {self.prior!r}")

    def sampler(self) -> Sampler:
        """Return the sampler of these chains."""
        return Sampler(self.steps, self.step_size, self.grad_clip, self.noise_std)


def fit_prior(split: Split, classes: int, rank: int) -> Prior:
    """Return a Gaussian per class, its covariance truncated to the ``rank`` largest principal components."""
    means, factors = [], []
    shape = (3, *split.image.shape[1:3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for y in range(classes):
            image = torch.from_numpy(split.image[split.label == y]).permute(0, 3, 1, 2).flatten(1).float() / 255.0
            mean = image.mean(dim=0)
            _, scale, components = torch.svd_lowrank(image - mean, q=min(rank, *image.shape), niter=4)
            factor = torch.zeros(rank, image.shape[1])  # a class of fewer images than ``rank`` leaves rows of zeros
            factor[: len(scale)] = components.T * (scale / max(1.0, np.sqrt(len(image) - 1)))[:, None]
            means.append(mean.reshape(shape).numpy())
            factors.append(factor.reshape(-1, *shape).numpy())
    return Prior(np.stack(means).astype(np.float32), np.stack(factors).astype(np.float32))


@lru_cache(maxsize=1)
def prior_of(data: Dataset, rank: int) -> Prior:
    """Return the prior of the training images, fitted once for a data set: chains, validation, DAT's seeds and the bundle share it."""
    return fit_prior(data.train, len(data.names), rank)


class Starts:
    """p0(x|y) on the device: the class Gaussian, or uniform pixels when there is no prior."""

    def __init__(self, prior: Prior | None, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape = shape
        if prior is not None:
            self.mean = torch.from_numpy(prior.mean).flatten(1).to(device)
            self.factor = torch.from_numpy(prior.factor).flatten(2).to(device)  # (K, rank, 3HW)
        self.gaussian = prior is not None

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        """Return one start per label, (N, 3, H, W) in [0,1]."""
        if not self.gaussian:
            return noise.uniform(len(label), *self.shape)
        classes, rank, _ = self.factor.shape
        z = noise.normal(len(label), rank)
        here = torch.nn.functional.one_hot(label, classes).to(z.dtype)
        spread = (here[:, :, None] * z[:, None, :]).flatten(1) @ self.factor.flatten(0, 1)  # z_n . factor_{y_n}, without a gather
        return (self.mean[label] + spread).clamp(0.0, 1.0).reshape(-1, *self.shape)


class ReplayBuffer:
    """This rank's persistent chains, (parts, size, 3, H, W), in class blocks; over all parts the classes are balanced."""

    def __init__(self, chains: ChainConfig, starts: Starts, classes: int, noise: Noise, device: torch.device) -> None:
        ranks = noise.ranks
        if SHARDS % ranks.world or chains.batch % SHARDS or chains.buffer_size % SHARDS or chains.batch > chains.buffer_size:
            raise TrainingError(
                f"chains of {chains.batch} from a buffer of {chains.buffer_size} on {ranks.world} processes: the first two must be "
                f"multiples of {SHARDS}, batch no more than buffer_size, and the processes 1, 2, 4 or 8"
            )
        self.chains, self.starts, self.ranks = chains, starts, ranks
        if chains.buffer_size < classes:
            raise TrainingError(f"a buffer of {chains.buffer_size} chains cannot hold {classes} classes: set buffer_size to more")
        parts, size = SHARDS // ranks.world, chains.buffer_size // SHARDS
        blocks = torch.arange(chains.buffer_size, device=device) * classes // chains.buffer_size
        own = slice(ranks.rank * parts, (ranks.rank + 1) * parts)
        self.label = blocks.view(size, SHARDS).T[own]  # dealt out, so that all parts have all classes
        self.chain = starts.draw(self.label.flatten(), noise).reshape(parts, size, *starts.shape)

    def draw(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """Return which chains move, as (part, place), each (N,): equally many of each part, none twice.

        Of two moves of one chain one would be lost, and which one would depend on threads.
        """
        parts, size = self.label.shape
        each = self.chains.batch // SHARDS
        place = noise.uniform(parts, size).argsort(dim=1)[:, :each].flatten()
        return torch.arange(parts, device=place.device).repeat_interleave(each), place

    def advance(self, model: nn.Module, noise: Noise) -> Tensor:
        """Return x_neg, (N, 3, H, W), by ``walk``; batch norm is frozen meanwhile."""
        with frozen(model) as network:
            (x_neg,) = together(network, self.walk(noise))
        return x_neg

    def walk(self, noise: Noise) -> Search:
        """Return an inner loop to x_neg: chains (N, 3, H, W), some started afresh from p0(x|y), moved by SGLD and kept."""
        part, place = self.draw(noise)
        label = self.label[part, place]
        fresh = noise.uniform(len(label), 1, 1, 1) < self.chains.reinit
        x = torch.where(fresh, self.starts.draw(label, noise), self.chain[part, place])
        target = label if self.chains.conditional else torch.full_like(label, MARGINAL)
        sampler = self.chains.sampler()
        for _ in range(sampler.steps):
            score = yield Ask(x, lambda logits: logit_weights(logits, target))
            x = langevin_step(x, score, noise.normal(*x.shape), sampler)
        self.chain[part, place] = x
        return x

    def saturation(self) -> Tensor:
        """Return the share of pixels at 0 or 1: near one when chains have diverged."""
        sample = self.chain.flatten(0, 1)[:: max(1, self.label.numel() // 200)]
        return ((sample <= 0.0) | (sample >= 1.0)).float().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chains of all ranks."""
        return {"chain": self.ranks.gather(self.chain)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.chain.copy_(self.ranks.share(state["chain"]))
