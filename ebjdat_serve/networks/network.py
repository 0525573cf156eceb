"""Base classes of networks: the module from images to logits, and the architecture that builds it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """Images (N, 3, H, W) in [0,1] to logits (N, classes): ``head`` of ``features``, pixels normalised inside.

    With ``autocast`` set to a dtype the features are computed in it, channels_last; logits, and so energies, are always fp32.
    """

    autocast: torch.dtype | None = None
    head: nn.Linear
    no_features: str = ""  # the reason why ``features`` are not what a last layer takes

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """Return the features that the head takes, (N, F)."""

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image, self.autocast or torch.float32)

    def logits(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits, features computed in ``dtype``."""
        logits: Tensor = self.head(self.features_in(image, dtype))
        return logits

    def features_in(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features, computed in ``dtype``, in fp32."""
        if dtype == torch.float32:
            return self.features(image)
        with torch.autocast(image.device.type, dtype):
            return self.features(image.contiguous(memory_format=torch.channels_last)).float()

    def folded(self, dtype: torch.dtype | None = None, features: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        """Return x -> logits in ``dtype`` (by default that of ``autocast``) for samplers, attacks and graphs; eval mode is assumed.

        ``features`` are those of ``folded_features`` where they are there, which hold a copy of the weights. Parameters must not change
        while it is used, and receive no gradient.
        """
        features, head = features or self.folded_features(dtype or self.autocast or torch.float32), self.head

        def forward(image: Tensor) -> Tensor:
            logits: Tensor = head(features(image))
            return logits

        return forward

    def folded_features(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return x -> features (N, F) in fp32, computed in ``dtype``; a family may return a faster form."""
        return partial(self.features_in, dtype=dtype)


class Architecture(ABC):
    """The sizes of a family's networks: a frozen dataclass that validates them."""

    family = ""  # its name in manifests; no annotation, which would make it a size

    @abstractmethod
    def build(self, classes: int) -> Network:
        """Return a network in train mode, initialised from torch's global generator."""

    def check_images(self, height: int, width: int) -> None:  # noqa: B027 (most networks take any size)
        """Raise ValueError, which names the accepted sizes, for images that the network cannot take."""

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> "tuple[Architecture, int] | None":
        """Return the architecture of ``weights`` and the number of classes, or None if they are of another family or ambiguous."""
        return None

    def described(self) -> dict[str, Any]:
        """Return family and sizes in the manifest's form."""
        return {"family": self.family, **vars(self)}
