"""A checkpoint as a source of ``ebjdat-serve import``: safetensors, or torch.load of weights alone; nothing in it is run."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ebjdat_serve.errors import EbjdatError, cause, first_line, visible
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.torch_source import NO_PRIOR, contract_of, licence_of, tried, unsaid
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import Capabilities, Licence
from ebjdat_serve.networks import architecture_of_weights, build
from ebjdat_serve.pixels import to_unit

LARGEST = 8 * 2**30
MOST_TENSORS, MOST_PICKLE = 100_000, 16 * 2**20
NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Where training programs put the weights of a checkpoint that holds more."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def find(source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
    """Return the classifier of a checkpoint whose family is known by its tensors; raise EbjdatError for any other.

    ``allow_code`` changes nothing: the network of other weights is given as ``python:package.module:callable@FILE``.
    """
    file = Path(source)
    weights = read_tensors(file)
    try:
        architecture, classes = architecture_of_weights(weights)
        with torch.device("meta"):  # names of tensors decide the sizes: they are compared before anything is allocated
            planned = build(architecture, classes).state_dict()
        if {name: tuple(part.shape) for name, part in planned.items()} != {name: tuple(part.shape) for name, part in weights.items()}:
            raise ValueError(f"its tensors are not those of a {architecture.family}")
        network = build(architecture, classes, weights)
    except (ValueError, RuntimeError) as error:
        raise EbjdatError(
            f"{printable(file)}: {first_line(error)}; name its network: timm:NAME@FILE, or python:package.module:callable@FILE"
        ) from error
    size, normalisation, said = contract_of(contract)
    if normalisation.said != type(normalisation)().said:
        raise EbjdatError(
            f"a {architecture.family} normalises its images itself: leave scale, mean, std and channel_order out of the contract"
        )
    from ebjdat_serve.importing import images

    try:
        architecture.check_images(size.height, size.width)
    except ValueError as error:
        raise EbjdatError(f"contract: {error}") from error
    network = network.requires_grad_(False)
    tried(network, torch.from_numpy(to_unit(images.made(size.height, size.width, 3))))
    known = licence_of(licence, contract)
    labels = labels or (contract.labels if contract else None)
    return Found(
        name=file.stem,
        source=printable(file.name),
        graph=network,
        architecture=architecture.described(),
        input=size,
        labels=labels,
        output="logits",
        capabilities=replace(Capabilities(), generate=NO_PRIOR),
        licence=known,
        reference=None,
        said=[f"a checkpoint of the family {architecture.family}, {classes} classes", *said],
        unknown=unsaid(labels, known),
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, with memory in proportion to the file; raise EbjdatError for any other file."""
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise EbjdatError(f"{printable(file)} is no regular file: save what comes through a pipe first")
        if size > LARGEST:
            raise EbjdatError(f"{printable(file)} has {size} bytes, more than {LARGEST}")
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch.save does not write
            read = torch.load(archive_of(file) or file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EbjdatError(f"{printable(file)} holds more than tensors, which is not read: save the state_dict alone") from error
    except (SafetensorError, zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise EbjdatError(f"{printable(file)} holds no weights that are read without running code: {first_line(error)}") from error
    except (AttributeError, IndexError, RecursionError, MemoryError, AssertionError, ImportError) as error:
        raise EbjdatError(f"{printable(file)} is damaged: {type(error).__name__}") from error
    except OSError as error:
        raise EbjdatError(f"{printable(file)} cannot be read: {cause(error)}") from error
    return tensors_of(read, size, printable(file))


def archive_of(file: Path) -> io.BytesIO | None:
    """Return a checkpoint's archive, written anew, so that torch reads what was judged: its reader may take another directory for it.

    None for a file that is no archive. Raises EbjdatError for one that unpacks to more than the file has, or whose pickle is of no set
    of weights.
    """
    if not zipfile.is_zipfile(file):
        if file.stat().st_size > LARGEST // 4:
            raise EbjdatError(f"{printable(file)} is of torch's old format and large: save it again with torch.save")
        return None
    written = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as copy:
        check_parts(file, archive.infolist())
        for part in archive.infolist():
            copy.writestr(zipfile.ZipInfo(part.filename), archive.read(part))
    written.seek(0)
    return written


def check_parts(file: Path, parts: list[zipfile.ZipInfo]) -> None:
    """Raise EbjdatError for parts of an archive that torch.save does not write."""
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise EbjdatError(f"{printable(file)} is compressed, as torch.save never does: save it again")
    if sum(part.file_size for part in parts) > file.stat().st_size:
        raise EbjdatError(f"{printable(file)} unpacks to more than it has: save it again with torch.save")
    if len(parts) > MOST_TENSORS or any(part.filename.endswith(".pkl") and part.file_size > MOST_PICKLE for part in parts):
        raise EbjdatError(f"{printable(file)} holds more than weights: save the state_dict alone")


def tensors_of(read: Any, size: int, where: str) -> dict[str, Tensor]:
    """Return the tensors in what a file of ``size`` bytes holds: a state_dict, or a checkpoint that has one."""
    for key in NESTED:
        if isinstance(read, Mapping) and isinstance(read.get(key), Mapping):
            read = read[key]
            break
    if not isinstance(read, Mapping) or not read or not all(isinstance(name, str) for name in read):
        raise EbjdatError(f"{where} holds no state_dict: torch.save(model.state_dict(), FILE) writes one")
    tensors = {name: value for name, value in read.items() if isinstance(value, Tensor)}
    if len(tensors) != len(read):
        other = next(name for name in read if name not in tensors)
        raise EbjdatError(f"{where}: {other[:80]!r} is no tensor: save the state_dict alone")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > 2 * size:  # of strides 0, say; some share weights
        raise EbjdatError(f"{where} has tensors that are larger than the file")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], file: Path, fix: str) -> nn.Module:
    """Return a module with the ``tensors`` of a checkpoint, every one of them; raise EbjdatError, with the ``fix``, if they do not fit."""
    wanted, held = (shapes(named) for named in (module.state_dict(), tensors))
    if fault := misfit(wanted, held):
        raise EbjdatError(f"{printable(file)} does not fit the network: {fault}; {fix}")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:  # what a module of somebody's own asks of its state beyond its tensors
        raise EbjdatError(f"{printable(file)} does not fit the network: {' '.join(str(error).split())[:300]}; {fix}") from error
    return module


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name; a module's other state has none and is left out."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def misfit(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first tensor of a file that is not what a network has by that name, and how many others, "" if all fit."""
    unlike = [name for name, shape in wanted.items() if held.get(name, shape) != shape]
    faults = [f"{name[:100]} is {sized(held[name])} in the file, and {sized(wanted[name])} in the network" for name in unlike]
    faults += [f"{name[:100]} is not in the file" for name in wanted if name not in held]
    faults += [f"{visible(name[:100])} is no tensor of the network" for name in held if name not in wanted]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else ""


def sized(shape: tuple[int, ...]) -> str:
    """Return a shape as people write it."""
    return " x ".join(map(str, shape)) or "one number"
