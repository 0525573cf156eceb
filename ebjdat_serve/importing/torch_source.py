"""What the torch sources of ``ebjdat-serve import`` have in common: a module is tried, wrapped and said to be what it is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ebjdat_serve.errors import OF_NETWORKS, EbjdatError, first_line
from ebjdat_serve.importing import images
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.manifest import YES, Capabilities, Input, Licence
from ebjdat_serve.networks import Foreign, Network, Normalisation, Wrapped, find_head
from ebjdat_serve.pixels import to_unit

NEEDED = ("height", "width", "resize", "filter")
"""What a contract must say of a network that says nothing of its images."""
ALONE = 1e-3
"""The most, of the largest logit, by which an answer may depend on the other images of its batch."""
NO_PRIOR = "no prior was fitted, where chains start (ebjdat-serve prior BUNDLE DIR)"


def found(
    module: nn.Module,
    architecture: Foreign,
    *,
    name: str,
    source: str,
    size: Input,
    labels: list[str] | None,
    licence: Licence,
    reference: Callable[[bytes], NDArray[np.float32]] | None,
    said: list[str],
    unknown: list[str],
) -> Found:
    """Return a module as what was found: its classes counted, its penultimate layer looked for.

    Raises EbjdatError for a module that does not take the images of the contract, or gives no logits.
    """
    module = module.float().eval().requires_grad_(False)
    plain = Wrapped(module, 0, architecture.normalisation)
    image = torch.from_numpy(to_unit(images.made(size.height, size.width, 3)))
    classes = tried(plain, image)
    head, lacking = find_head(module, plain.normalised(image))
    architecture = replace(architecture, head=head)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    about = [f"{parameters / 1e6:.2f} million parameters, {classes} classes", f"it takes {architecture.normalisation.said}"]
    if head:
        about.append(f"features are what its layer {head} takes")
    return Found(
        name=name,
        source=source,
        graph=Wrapped(module, classes, architecture.normalisation, head).eval(),
        architecture=architecture.described(),
        input=size,
        labels=labels,
        output="logits",
        capabilities=Capabilities(features=lacking or YES, generate=NO_PRIOR),
        licence=licence,
        reference=reference,
        said=[*said, *about],
        unknown=[*unknown, *unsaid(labels, licence)],
    )


def tried(network: Network, image: Tensor) -> int:
    """Return the number of classes of a network that was run on images (3, 3, H, W); raise EbjdatError for one that is no classifier."""
    try:
        with torch.no_grad():
            logits, alone = network(image), network(image[:1])
    except OF_NETWORKS as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise EbjdatError(f"the network does not take images of {tuple(image.shape[1:])}: {said}") from error
    if len(logits) != len(image) or logits.shape[1] < 2:
        raise EbjdatError(f"the network gives {tuple(logits.shape)} for {len(image)} images, not logits of two classes or more")
    if not logits.isfinite().all():
        raise EbjdatError("the network gives values that are not finite")
    if (logits[:1] - alone).abs().max() > ALONE * logits.abs().max():
        raise EbjdatError("what the network says of an image depends on the others of its batch: it cannot be served")
    if normalised(logits):
        raise EbjdatError(
            "the network gives probabilities or their logs, of which every energy is the same: return the logits, before its softmax"
        )
    return int(logits.shape[1])


def normalised(logits: Tensor) -> bool:
    """Return whether outputs are probabilities, or logs of them."""
    sums = logits.sum(dim=1) if (logits >= 0).all() else torch.logsumexp(logits, dim=1).exp()
    return bool(((sums - 1).abs() < 1e-4).all())


def unsaid(labels: list[str] | None, licence: Licence) -> list[str]:
    """Return what is not known of labels and licences, in sentences."""
    lacking = [name for name, value in vars(licence).items() if value == "unknown"]
    return [
        *([] if labels else ["what the classes are called; they are numbered (--labels FILE names them)"]),
        *([f"the licence of {', '.join(lacking)}"] if lacking else []),
    ]


def contract_of(contract: Contract | None) -> tuple[Input, Normalisation, list[str]]:
    """Return what a contract file says of a network of one's own, and sentences on it; raise EbjdatError where it lacks sizes."""
    told = contract.input if contract else {}
    if lacking := [name for name in NEEDED if name not in told]:
        raise EbjdatError(
            f"the source does not say how an image becomes its input: give a contract with {', '.join(lacking)}"
            " (and scale, mean, std and channel_order, unless it takes RGB in [0,1])",
            options=("--contract FILE",),
        )
    assert contract is not None
    height, width = contract.size("height"), contract.size("width")
    assert height is not None and width is not None
    normalisation = Normalisation(
        contract.scale or 1.0,
        contract.mean or [0.0, 0.0, 0.0],
        contract.std or [1.0, 1.0, 1.0],
        "bgr" if contract.channel_order == "BGR" else "rgb",
    )
    return contract.input_of(height, width), normalisation, ["how an image becomes its input: from the contract file"]


def told_itself(contract: Contract | None, what: str) -> None:
    """Raise EbjdatError for a contract that says how images become the input of a source that says so itself."""
    if contract and (contract.input or contract.channel_order or contract.scale is not None or contract.mean or contract.std):
        raise EbjdatError(f"{what} says itself how an image becomes its input: leave all but labels and licence out of the contract")


def licence_of(given: Licence | None, contract: Contract | None, **known: Any) -> Licence:
    """Return the licence: what the command says, else the contract, else the source."""
    told = contract.licence if contract else Licence()
    values = {}
    for name in vars(Licence()):
        wishes = [getattr(one, name) for one in (given, told) if one is not None]
        values[name] = next((wish for wish in [*wishes, known.get(name) or ""] if wish not in ("unknown", "")), "unknown")
    return Licence(**values)
