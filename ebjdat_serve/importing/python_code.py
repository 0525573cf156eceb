"""Python code as a source of ``ebjdat-serve import``: ``python:package.module:callable``, with ``--allow-code`` alone."""

import os
import sys
from importlib import import_module
from pathlib import Path

from torch import nn

from ebjdat_serve.errors import EbjdatError, first_line
from ebjdat_serve.importing.checkpoint import load_into, read_tensors
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.torch_source import contract_of, found, licence_of
from ebjdat_serve.manifest import Licence
from ebjdat_serve.networks import PythonArchitecture


def find(source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
    """Return the classifier that a callable makes, with the weights of ``@FILE`` where the source names one.

    Modules of the working directory are found, too. Raises EbjdatError without ``allow_code``, and for code that makes no classifier.
    """
    name, _, file = source.removeprefix("python:").partition("@")
    if not allow_code:
        refusal = f"{source[:100]} is code, which would run with your rights: give a file or a folder in its place"
        raise EbjdatError(refusal, options=("--allow-code",))
    size, normalisation, said = contract_of(contract)
    try:
        architecture = PythonArchitecture(name, normalisation=normalisation)
    except ValueError as error:
        raise EbjdatError(f"{source[:100]}: {error}") from error
    module = made(name)
    if file:
        module = load_into(module, read_tensors(Path(file)), Path(file), f"have {name} make the network that these weights are of")
        said = [*said, f"weights: {Path(file).name}"]
    return found(
        module,
        architecture,
        name=name.rpartition(":")[2],
        source=source.partition("@")[0],
        size=size,
        labels=labels or (contract.labels if contract else None),
        licence=licence_of(licence, contract),
        reference=None,
        said=[f"the module that {name} returned, code of yours", *said],
        unknown=["whether the contract is what the network was trained behind"],
    )


def made(name: str) -> nn.Module:
    """Return the module that a callable makes, by ``package.module:callable``; raise EbjdatError for whatever goes wrong there."""
    place, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = import_module(place)
        for part in path.split("."):
            value = getattr(value, part)
        module = value() if not isinstance(value, nn.Module) else value  # type: ignore[operator]
    except Exception as error:
        raise EbjdatError(f"{name} cannot be called: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise EbjdatError(f"{name} returned {type(module).__name__}, not a torch.nn.Module")
    return module
