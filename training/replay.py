"""The class-informative prior and the replay buffer of persistent chains (JEM++, arXiv 2109.09032)."""

import numpy as np
import torch
from torch import Tensor

from ebjdat_serve.energy import score
from ebjdat_serve.sgld import Prior, Sampler, sgld
from ebjdat_serve.wideresnet import WideResNet
from training.adversary import frozen
from training.images import Split


def fit_prior(split: Split, classes: int, rank: int) -> Prior:
    """Return the per-class Gaussian of the images, its covariance cut to the ``rank`` largest principal components."""
    means, factors = [], []
    shape = (3, *split.image.shape[1:3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for y in range(classes):
            image = torch.from_numpy(split.image[split.label == y]).permute(0, 3, 1, 2).flatten(1).float() / 255.0
            mean = image.mean(dim=0)
            _, scale, components = torch.svd_lowrank(image - mean, q=min(rank, *image.shape), niter=4)
            factor = components.T * (scale / np.sqrt(len(image) - 1))[:, None]
            means.append(mean.reshape(shape).numpy())
            factors.append(factor.reshape(-1, *shape).numpy())
    return Prior(np.stack(means).astype(np.float32), np.stack(factors).astype(np.float32))


class ReplayBuffer:
    """Persistent chains in class blocks: chain i belongs to class i // (size / classes)."""

    def __init__(self, prior: Prior, size: int, reinit: float, seed: int, device: torch.device) -> None:
        classes = len(prior.mean)
        if size % classes:
            raise ValueError(f"buffer_size must be a multiple of the {classes} classes, not {size}")
        self.reinit = reinit
        self.label = torch.arange(classes, device=device).repeat_interleave(size // classes)
        labels = self.label.cpu().numpy()
        # Twice the buffer in starts, drawn once: drawing them one by one in every step is what the released code does.
        self.starts = torch.from_numpy(prior.sample(labels, [np.random.default_rng((seed, i)) for i in range(size)])).to(device)
        self.chain = torch.from_numpy(prior.sample(labels, [np.random.default_rng((seed, size + i)) for i in range(size)])).to(device)

    def advance(self, model: WideResNet, n: int, sampler: Sampler, generator: torch.Generator) -> Tensor:
        """Return x_neg: n chains (N, 3, H, W), some started afresh, moved by ``sampler`` along -dE(x,y)/dx and kept.

        Batch norm is frozen meanwhile.
        """
        device = self.chain.device
        # without replacement: of two moves of one chain one would be lost, and which one would depend on threads
        index = torch.randperm(len(self.chain), generator=generator, device=device)[:n]
        block = len(self.chain) // (int(self.label[-1]) + 1)
        # a fresh start of the same class: another place in the same block
        other = index // block * block + torch.randint(0, block, (n,), generator=generator, device=device)
        fresh = torch.rand(n, generator=generator, device=device) < self.reinit
        x = torch.where(fresh[:, None, None, None], self.starts[other], self.chain[index])
        label = self.label[index]
        with frozen(model):
            x_neg = sgld(
                lambda image: score(model, image, label)[0],
                x,
                lambda: torch.randn(x.shape, generator=generator, device=device),
                sampler,
            )
        self.chain[index] = x_neg
        return x_neg

    def saturation(self) -> Tensor:
        """Return the share of pixels at 0 or 1: near one when chains have run away."""
        sample = self.chain[:: max(1, len(self.chain) // 200)]
        return ((sample <= 0.0) | (sample >= 1.0)).float().mean()
