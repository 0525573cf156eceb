"""Anybody's module as a Network: pixels normalised inside, fp32 logits, and the features that its last linear layer takes."""

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from ebjdat_serve.errors import EngineError
from ebjdat_serve.networks.network import Network
from ebjdat_serve.networks.normalisation import Normalisation

NO_HEAD = "no linear layer of the network gives its logits, so there is no penultimate layer to take features from"


class Wrapped(Network):
    """``module`` on normalised pixels; ``head`` is its last linear layer by name, "" where nothing is known to take features.

    Only in fp32: whether a stranger's module stands autocast is not known.
    """

    dtypes = (torch.float32,)
    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, classes: int, normalisation: Normalisation, head: str = "") -> None:
        super().__init__(classes)
        self.module, self.normalisation, self.head_name = module, normalisation, head
        self.register_buffer("mean", torch.tensor(normalisation.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalisation.std).reshape(3, 1, 1), persistent=False)
        self.no_features = "" if head else NO_HEAD
        if head and not isinstance(named(module, head), nn.Linear):
            raise ValueError(f"its last linear layer is said to be {head[:80]!r}, and it has none of that name")

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]  # not a module of its own, which would be a second name of its weights
        """Return the layer from features to logits; the identity where features are the logits."""
        return cast(nn.Linear, self.module.get_submodule(self.head_name) if self.head_name else nn.Identity())

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = logits_of(self.module(self.normalised(image))).float()
        return logits

    def normalised(self, image: Tensor) -> Tensor:
        """Return what the module takes."""
        x = image.flip(1) if self.normalisation.channels == "bgr" else image
        if self.normalisation.scale != 1:
            x = x * self.normalisation.scale
        return (x - self.mean) / self.std

    def logits(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        self.check_dtype(dtype)
        result: Tensor = self(image)
        return result

    def features(self, image: Tensor) -> Tensor:
        """Return what the last linear layer takes, (N, F); the logits where there is none."""
        if not self.head_name:
            result: Tensor = self(image)
            return result
        taken: list[Tensor] = []
        own = get_ident()  # a hook sees what every thread gives the layer
        handle = self.head.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]) if get_ident() == own else None)
        try:
            self(image)
        finally:
            handle.remove()
        return taken[-1].flatten(1)

    def features_in(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        self.check_dtype(dtype)
        return self.features(image)

    def folded(self, dtype: torch.dtype | None = None, features: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        """Return the network itself."""
        self.check_dtype(dtype or torch.float32)
        return self

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise EngineError for another type than fp32."""
        if dtype not in self.dtypes:
            raise EngineError(
                f"a network of this family runs in fp32 alone with torch, not in {str(dtype).removeprefix('torch.')}",
                options=("--precision fp32",),
            )


def named(module: nn.Module, name: str) -> nn.Module | None:
    """Return the layer of ``module`` by its dotted name, None where there is none."""
    return dict(module.named_modules()).get(name)


def logits_of(output: Any) -> Tensor:
    """Return the logits (N, K) in what a module returned: a tensor, an object or a mapping with ``logits``, or the first of several.

    Raises ValueError for anything else.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"it returns {type(output).__name__} and no tensor of logits")
    logits: Tensor = output.flatten(1) if output.dim() > 2 else output
    if logits.dim() != 2:
        raise ValueError(f"it returns a tensor of shape {tuple(logits.shape)}, not logits (N, K)")
    return logits


def find_head(module: nn.Module, example: Tensor) -> tuple[str, str]:
    """Return the name of the linear layer whose output is the logits of normalised images ``example``, or "" and the reason.

    The layer must run once a forward pass and map features (N, F), flattened, to exactly the logits.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        layer.register_forward_hook(lambda _, taken, given, name=name: calls.setdefault(name, []).append((taken[0], given)))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = logits_of(module(example))
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in reversed(calls.items()):
        taken, given = seen[-1]
        if len(seen) == 1 and given.shape == logits.shape and torch.equal(given, logits):
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if taken.flatten(1).shape == (len(example), layer.in_features):
                return name, ""
    return "", NO_HEAD
