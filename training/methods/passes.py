"""Passes of inner loops through a network with folded norms: weights in fixed memory, and on a GPU one launch for each direction."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebjdat_serve.engines.eager import captured
from ebjdat_serve.errors import first_line
from ebjdat_serve.networks import Network

FEW = 20
"""Passes of a shape before it is captured, which takes as long as some: a network that is soon gone is not."""
APART = 0.05
"""The most, of the gradient's length, by which a captured pass may differ from one that is not: kernels of bf16 add in any order."""
log = logging.getLogger("training")


class Passes:
    """A network, folded, as a function of images (N, 3, H, W) to logits (N, K), and its input gradients."""

    def __init__(self, model: Network) -> None:
        assert model.autocast is not None
        self._features = model.folded_features(model.autocast)
        self._logits = partial(logits_of, self._features, model.head)  # what graphs call: no reference back to what holds them
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, Graphs | None] = {}  # None: not enough memory
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the network folds and captures by itself

    @staticmethod
    def of(model: Network) -> "Passes":
        """Return a network's passes, folded as its weights and norms now are."""
        known: Passes | None = vars(model).get("_passes")
        if known is None:
            model.__dict__["_passes"] = known = Passes(model)  # no submodule, nor part of its state
        elif refold := getattr(known._features, "refold", None):
            refold()
        return known

    @staticmethod
    def drop(model: Network) -> None:
        """Give back the memory of a network's passes: each captured shape keeps the activations of one."""
        vars(model).pop("_passes", None)

    def __call__(self, image: Tensor) -> Tensor:
        return self._logits(image)

    def gradient(self, image: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """Return d objective / dx of images, by ``slope``, d objective / d logits of the logits; the next pass may overwrite it."""
        self._seen[image.shape] += 1
        if self._seen[image.shape] <= FEW or not on_gpu(image):
            return gradient_of(self._logits, image, slope)
        if image.shape not in self._graphs:
            self._graphs[image.shape] = self._captured(image, slope)
        graphs = self._graphs[image.shape]
        return gradient_of(self._logits, image, slope) if graphs is None else graphs.gradient(image, slope)

    def _captured(self, image: Tensor, slope: Callable[[Tensor], Tensor]) -> "Graphs | None":
        """Return the passes of a shape, captured, or None where the GPU's memory is too small to keep one beside the rest."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return Graphs(self._logits, image, slope, self._pool)
        except torch.OutOfMemoryError as error:
            log.warning(
                "a captured pass of %d images does not fit into the GPU's memory, so calls are launched one by one: %s",
                len(image),
                first_line(error),
            )
        torch.cuda.empty_cache()  # after the handler: the error's traceback holds what was computed
        return None


class Graphs:
    """The two directions of a pass in fixed memory, each captured as one launch."""

    def __init__(self, network: Callable[[Tensor], Tensor], image: Tensor, slope: Callable[[Tensor], Tensor], pool: Any) -> None:
        self._network = network
        self._image = torch.zeros_like(image).requires_grad_()  # not the image of the check below, which then needs the copy, too
        self._forward()
        self._slope, self._found = torch.zeros_like(self._logits), torch.zeros_like(self._image)
        self._ahead = captured(self._forward, pool)
        self._back = captured(self._backward, pool)
        self._whole = self._ahead != self._forward and self._back != self._backward
        if self._whole:
            expected = gradient_of(network, image, slope)
            off = float((self.gradient(image, slope) - expected).norm() / expected.norm().clamp_min(1e-20))
            if not off <= APART:  # no GPU has shown yet that it cannot be
                log.warning("captured passes are off by %.1e of the gradient, so calls are launched one by one", off)
                self._whole = False
        if not self._whole:
            del self._ahead, self._back, self._logits, self._found  # and the memory of their activations
            torch.cuda.empty_cache()

    def _forward(self) -> None:
        with torch.enable_grad():
            self._logits = self._network(self._image)

    def _backward(self) -> None:
        (self._found,) = torch.autograd.grad(self._logits, self._image, grad_outputs=self._slope, retain_graph=True)

    def gradient(self, image: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """Return d objective / dx, in memory that the next pass overwrites."""
        if not self._whole:
            return gradient_of(self._network, image, slope)
        with torch.no_grad():
            self._image.copy_(image)
        self._ahead()
        with torch.no_grad():
            self._slope.copy_(slope(self._logits.detach()))
        self._back()
        return self._found


def logits_of(features: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Return the logits (N, K) of images."""
    return head(features(image))


def gradient_of(network: Callable[[Tensor], Tensor], image: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Return d objective / dx of images, call by call."""
    with torch.enable_grad():
        x = image.detach().requires_grad_()
        logits = network(x)
        (found,) = torch.autograd.grad(logits, x, grad_outputs=slope(logits.detach()))
    return found


def on_gpu(image: Tensor) -> bool:
    """Return whether images lie where calls are captured."""
    return image.is_cuda
