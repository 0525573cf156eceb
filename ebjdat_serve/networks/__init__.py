"""Network families, one file each, built by their name in a manifest. To add a family, write a file and add it to FAMILIES."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ebjdat_serve.errors import BundleError
from ebjdat_serve.networks.foreign import (
    Foreign,
    HuggingFaceArchitecture,
    OnnxArchitecture,
    PythonArchitecture,
    TimmArchitecture,
    config_fault,
    huggingface_config,
    package,
)
from ebjdat_serve.networks.network import Architecture, Network
from ebjdat_serve.networks.normalisation import Normalisation
from ebjdat_serve.networks.wideresnet import WideResNetArchitecture
from ebjdat_serve.networks.wrapped import Wrapped, find_head
from ebjdat_serve.parsing import parse

FAMILIES: dict[str, type[Architecture]] = {
    WideResNetArchitecture.family: WideResNetArchitecture,
    TimmArchitecture.family: TimmArchitecture,
    HuggingFaceArchitecture.family: HuggingFaceArchitecture,
    PythonArchitecture.family: PythonArchitecture,
    OnnxArchitecture.family: OnnxArchitecture,
}
"""Every family by its name in manifests."""
FOREIGN = (TimmArchitecture, HuggingFaceArchitecture, PythonArchitecture, OnnxArchitecture)
"""Those that import brings: never guessed from weights, and not trained from scratch here."""
Plain = WideResNetArchitecture
"""The family that budgets and methods take where none is named."""
CONSTANT = "constant."
"""What the names of tensors in weights.safetensors begin with that only graphs take: what the exporter computed of the weights."""


def architecture_of(described: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a manifest describes; raise BundleError for an unknown family or invalid sizes."""
    sizes = dict(described)
    family = sizes.pop("family", None)
    if family not in FAMILIES:
        raise BundleError(f"architecture: {family!r} is not a known family of networks: {', '.join(FAMILIES)}")
    try:
        return parse(FAMILIES[family], sizes, f"architecture of {family}")
    except ValueError as error:
        raise BundleError(f"architecture of {family}: {error}") from error


def build(architecture: Architecture, classes: int, weights: Mapping[str, Tensor] | None = None) -> Network:
    """Return a network in eval mode, with ``weights`` loaded strictly when given; raise RuntimeError for weights that do not fit."""
    network = architecture.build(classes)
    if weights is not None:
        network.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(CONSTANT)})
    return network.eval()


def network_of(weights: Mapping[str, Tensor]) -> Network:
    """Return the network of ``weights``, inferred from their names and shapes, in eval mode; raise ValueError when no family matches."""
    return build(*architecture_of_weights(weights), weights)


def architecture_of_weights(weights: Mapping[str, Tensor]) -> tuple[Architecture, int]:
    """Return the architecture of ``weights`` and the number of classes; raise ValueError when no family matches."""
    for kind in FAMILIES.values():
        if (found := kind.of_weights(weights)) is not None:
            return found
    raise ValueError(f"its tensors match no network family: {', '.join(name for name, kind in FAMILIES.items() if kind not in FOREIGN)}")


__all__ = [
    "CONSTANT",
    "FAMILIES",
    "FOREIGN",
    "Architecture",
    "Foreign",
    "HuggingFaceArchitecture",
    "Network",
    "Normalisation",
    "Plain",
    "PythonArchitecture",
    "TimmArchitecture",
    "Wrapped",
    "architecture_of",
    "architecture_of_weights",
    "build",
    "config_fault",
    "find_head",
    "huggingface_config",
    "network_of",
    "package",
]  # fmt: skip
