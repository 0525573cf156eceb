"""What a source of ``ebjdat-serve import`` is found to be: the one form that every kind of source is read into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.manifest import Capabilities, Input, Licence

if TYPE_CHECKING:
    from ebjdat_serve.networks import Network


@dataclass(frozen=True)
class Found:
    """A classifier of somebody else, read and not yet written as a bundle."""

    name: str
    source: str
    graph: (
        Network | bytes
    )  # normalisation inside; bytes: a cleaned ONNX ModelProto. RGB NCHW [0,1] in, logits|probabilities (, features) out
    architecture: dict[str, Any]  # family + arguments for bundle.json
    input: Input
    labels: list[str] | None
    output: Literal["logits", "probabilities"]
    capabilities: Capabilities
    licence: Licence
    reference: Callable[[bytes], NDArray[np.float32]] | None  # the source's own pipeline, encoded image -> logits (K,)
    said: list[str]  # what was found, in sentences
    unknown: list[str]  # what could not be known
