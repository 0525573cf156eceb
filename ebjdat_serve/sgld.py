"""Langevin sampling (SGLD) and the prior that chains start from, for NumPy arrays and torch tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ebjdat_serve.batch import Batch
from ebjdat_serve.bounds import Bounds

Array = TypeVar("Array", bound=Any)
Floats = NDArray[np.float32]
PRIME = 2**31 - 1
"""Modulus of the prime field of noise keys."""
STEPS, NOISE = 40, 0.005
"""Steps, and the noise of one, of the chains of an imported model where nobody says others (docs/decisions/0031)."""


@dataclass(frozen=True)
class Sampler:
    """Parameters of one proximal SGLD chain; lengths in pixel units of [0,1].

    With an affine first layer this is also JEM++'s PYLD(M, N): steps = M, step_size = N alpha.
    """

    steps: Annotated[int, Bounds(1, 10_000)]  # bounds hold for what a bundle says
    step_size: Annotated[float, Bounds(0, 1e3)]
    grad_clip: Annotated[float, Bounds(0, 1e9)]
    noise_std: Annotated[float, Bounds(0, 10)]


def langevin_step(x: Array, score: Array, noise: Array, sampler: Sampler) -> Array:
    """Return x <- clip01(x + step_size clip(score, +-grad_clip) + noise_std noise), shapes (N, 3, H, W).

    This is short-run sampling with large, clipped, nearly noiseless steps, as in the JEM lineage (arXiv 2109.09032,
    2209.07959): not an exact draw from p(x|y).
    """
    drift = sampler.step_size * score.clip(-sampler.grad_clip, sampler.grad_clip)
    moved: Array = (x + drift + sampler.noise_std * noise).clip(0.0, 1.0)
    return moved


def sgld(score: Callable[[Array], Array], x: Array, normal: Callable[[], Array], sampler: Sampler) -> Array:
    """Return x after ``sampler.steps`` Langevin steps along ``score(x)`` = -dE/dx, with noise drawn by ``normal()``."""
    for _ in range(sampler.steps):
        x = langevin_step(x, score(x), normal(), sampler)
    return x


@dataclass(frozen=True)
class Prior:
    """p0(x|y) = N(mean_y, factor_y^T factor_y), enlarged to ``size`` and clipped to [0,1].

    mean (C, 3, h, w) and factor (C, rank, 3, h, w) are of ``classes`` (C,), ascending; without them of all classes, in order. ``size`` is
    (H, W), at least (h, w); without it nothing is enlarged.
    """

    mean: Floats
    factor: Floats
    classes: NDArray[np.int64] | None = None
    size: tuple[int, int] | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the classes that it is of."""
        return np.arange(len(self.mean)) if self.classes is None else self.classes

    def of(self, labels: Sequence[int], height: int, width: int) -> bool:
        """Return whether it is a prior of these classes, in order, for images of (height, width): its arrays fit together."""
        c, low = len(labels), self.mean.shape[2:]
        fits = self.mean.shape == (c, 3, *low) and len(low) == 2 and self.factor.shape == (c, *self.factor.shape[1:2], 3, *low)
        return bool(
            fits and c and np.array_equal(self.labels, labels) and (self.size or low) == (height, width) and 0 < low[0] <= height
            and 0 < low[1] <= width
        )  # fmt: skip

    def sample(self, label: NDArray[np.int64], noises: "Sequence[np.random.Generator]") -> Floats:
        """Return one start per label, (N, 3, H, W) float32 in [0,1]; image i depends only on ``noises[i]``.

        Raises ValueError for a class that the prior is not of.
        """
        rank, rows = self.factor.shape[1], label
        if self.classes is not None:
            rows = np.searchsorted(self.classes, label).clip(0, len(self.classes) - 1)
            if (strange := label[self.classes[rows] != label]).size:
                raise ValueError(f"the prior is not of class {strange[0]}")
        starts = np.stack([
            self.mean[y] + np.tensordot(noise.standard_normal(rank, dtype=np.float32), self.factor[y], axes=1)
            for y, noise in zip(rows, noises, strict=True)
        ])  # fmt: skip
        return (enlarged(starts, *self.size) if self.size else starts).clip(0.0, 1.0).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the prior as safetensors: mean in fp32, factor in fp16."""
        # safetensors writes the bytes as they lie in memory: an array in Fortran order would be read back scrambled
        mean, factor = np.ascontiguousarray(self.mean), np.ascontiguousarray(self.factor, dtype=np.float16)
        tensors: dict[str, NDArray[Any]] = {"mean": mean, "factor": factor}
        if self.classes is not None:
            tensors["classes"] = np.ascontiguousarray(self.classes, np.int64)
        if self.size is not None:
            tensors["size"] = np.array(self.size, np.int64)
        save_file(tensors, path)

    @staticmethod
    def load(path: Path) -> "Prior":
        """Read a prior written by ``save``; raise SafetensorError, KeyError or ValueError for another file."""
        tensors = load_file(path)
        size = tensors.get("size")
        if size is not None and size.shape != (2,):
            raise ValueError(f"size is of shape {size.shape}, not (2,)")
        height_width = None if size is None else (int(size[0]), int(size[1]))
        return Prior(tensors["mean"], tensors["factor"].astype(np.float32), tensors.get("classes"), height_width)


def enlarged(image: Floats, height: int, width: int) -> Floats:
    """Return images (N, 3, h, w) as (N, 3, height, width), bilinear between the centres of pixels, beyond the outermost the edge."""

    def shares(cells: int, size: int) -> Floats:
        at = ((np.arange(size) + 0.5) * cells / size - 0.5).clip(0, cells - 1)
        found: Floats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)
        return found

    rows, columns = shares(image.shape[2], height), shares(image.shape[3], width)
    return (rows @ image @ columns.T).astype(np.float32, copy=False)


def noises(seed: int, n: int) -> list[np.random.Generator]:
    """Return one noise source per image; that of image i depends only on ``seed + i``."""
    return [np.random.default_rng(seed + i) for i in range(n)]


@dataclass(frozen=True)
class Chains(Batch):
    """The complete state of N chains; its arrays are named as the step graph's inputs."""

    moving = ("image", "step")

    image: Floats  # (N, 3, H, W) in [0,1]
    label: NDArray[np.int64]  # (N,); -1 samples from the marginal E(x)
    key: NDArray[np.int64]  # (N, 4, 4) below PRIME: the key of a chain's noise
    step: NDArray[np.int64]  # (N,) steps taken
    step_size: Floats  # (N,), as are the next two
    grad_clip: Floats
    noise_std: Floats

    @staticmethod
    def start(prior: Prior, sampler: Sampler, label: NDArray[np.int64], seed: int) -> "Chains":
        """Return chains drawn from the prior before their first step; chain i depends only on ``label[i]`` and ``seed + i``."""
        return Chains.at(prior.sample(label, noises(seed, len(label))), sampler, label, seed)

    @staticmethod
    def at(image: Floats, sampler: Sampler, label: NDArray[np.int64], seed: int) -> "Chains":
        """Return chains at ``image`` before their first step; the noise of chain i depends only on ``seed + i``."""
        n = len(label)
        # a stream of its own: the prior draws from default_rng(seed + i)
        key = np.stack([np.random.default_rng((seed + i, 1)).integers(0, PRIME, (4, 4)) for i in range(n)])
        each = [np.full(n, value, np.float32) for value in (sampler.step_size, sampler.grad_clip, sampler.noise_std)]
        return Chains(image, label.astype(np.int64, copy=False), key, np.zeros(n, np.int64), *each)

    def moved(self, image: Floats, steps: int) -> "Chains":
        """Return these chains at ``image``, advanced by ``steps``."""
        return replace(self, image=image, step=self.step + steps)
