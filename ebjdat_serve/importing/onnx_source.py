"""An ONNX file as a source of ``ebjdat-serve import``: nothing of it runs but ONNX's own operators, first in a process with limits."""

from dataclasses import dataclass, fields
from pathlib import Path

from safetensors.numpy import load_file

from ebjdat_serve.engines import Floats
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.importing import contract_file, labels
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.onnx_reader import ANSWERS, SERVED, Looked, Tried, looked_at, tried_out, workplace
from ebjdat_serve.importing.onnx_rewrite import Pixels
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import YES, Capabilities, Licence

NO_GRADIENT = "the model was imported from ONNX, which has no gradient"


@dataclass(frozen=True)
class FoundGraph(Found):
    """An ONNX classifier; ``answers`` are the graph's as its file has it on the images of ``images.made``, for the self-test."""

    answers: dict[str, Floats]
    classes: int


def find(source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
    """Return the classifier in an ONNX file.

    Raises EbjdatError for a file that is refused, that is no image classifier, or whose contract is not said whole. ``allow_code`` changes
    nothing: there is no code in it that could be allowed.
    """
    file = Path(source)
    if contract is None or contract.missing():
        raise _unsaid(file, contract, looked_at(file, contract.layout if contract else "", contract.output if contract else ""))
    assert contract.channel_order and contract.scale is not None and contract.mean and contract.std
    pixels = Pixels(contract.channel_order, contract.scale, contract.mean, contract.std)
    with workplace() as folder:
        tried = tried_out(file, folder, pixels, contract.layout, contract.output, contract.size("height"), contract.size("width"))
        answers = load_file(folder / ANSWERS)
        graph = (folder / SERVED).read_bytes()
    named, where = _labels(tried, labels or contract.labels, file)
    sizes = contract.input_of(*tried.size)
    return FoundGraph(
        name=file.stem,
        source=printable(file.name),
        graph=graph,
        architecture={"family": "onnx", "opset": tried.opset},
        input=sizes,
        labels=named,
        output=tried.output,
        capabilities=capabilities(tried),
        licence=licence or contract.licence,
        reference=None,
        said=_said(tried, pixels, where if named else ""),
        unknown=_unknown(tried, named, where, licence or contract.licence),
        answers=answers,
        classes=tried.classes,
    )


def capabilities(tried: Tried) -> Capabilities:
    """Return what can be asked of a graph: the energy of its logits, its features; no gradient."""
    reasons = {
        "energy": tried.energy or YES,
        "features": YES if tried.features else "the layer that gives the logits was not found in the graph",
        "gradient": NO_GRADIENT,
        "generate": f"drawing follows a gradient: {NO_GRADIENT}",
    }
    return Capabilities(**{name: why for name, why in reasons.items() if name in {one.name for one in fields(Capabilities)}})


def write_template(source: str, file: Path) -> Looked:
    """Write a contract file for an ONNX graph, with what the graph says filled in, and return that."""
    looked = looked_at(Path(source))
    found, _ = labels.of_metadata(looked.metadata, looked.classes or 0)
    image = looked.image
    contract_file.write_template(file, height=image.height, width=image.width, layout=image.layout, output=looked.head.output, labels=found)
    return looked


def _unsaid(file: Path, contract: Contract | None, looked: Looked) -> EbjdatError:
    """Return the error for a contract that does not say what no graph says."""
    names = contract.missing() if contract else list(contract_file.ASKED)
    line = contract_file.as_line(names)
    return EbjdatError(
        f"{printable(file)} takes {_sizes(looked)} and does not say how an image becomes that: "
        f"{'the contract lacks' if contract else 'give --contract FILE with'} what it was trained with, such as {line}; "
        f"ebjdat-serve import {printable(file)} --write-contract FILE begins one (docs/import.md)"
    )


def _sizes(looked: Looked) -> str:
    image = looked.image
    high, wide = image.height or "H", image.width or "W"
    return f"N x 3 x {high} x {wide}" if image.layout == "NCHW" else f"N x {high} x {wide} x 3"


def _labels(tried: Tried, given: list[str] | None, file: Path) -> tuple[list[str] | None, str]:
    if given is not None:
        return labels.checked(given, tried.classes, "the labels given"), "labels as given"
    return labels.of_metadata(tried.looked.metadata, tried.classes)


def _said(tried: Tried, pixels: Pixels, labelled: str) -> list[str]:
    looked = tried.looked
    by = f", written by {looked.producer}" if looked.producer else ""
    ending = {"softmax": "its softmax is cut off", "log-softmax": "its log-softmax is cut off", "sigmoid": "it ends in a sigmoid"}
    batch = f"; it was written for {looked.image.batch} and now takes any number" if looked.image.batch else ""
    features = f"{tried.features} features, which the last layer takes" if tried.features else "no features"
    normal = f"(pixel in [0,1] * {pixels.scale:g} - {pixels.mean}) / {pixels.std}"
    version = f", converted to {tried.opset}" if tried.opset != looked.opset else ""
    return [
        f"an ONNX graph in version {looked.opset} of its operators{version}{by}",
        f"it takes {_sizes(looked)}, {pixels.channel_order}, {normal}: now in the graph{batch}",
        f"{tried.classes} classes from {looked.head.output[:60]!r}, {ending.get(looked.head.ending, 'which are logits')}; {features}",
        f"rewritten, it answers as the file does to {tried.error:.0e} of the largest value, on 8 images and on one",
        *([labelled] if labelled else []),
    ]


def _unknown(tried: Tried, named: list[str] | None, refused: str, licence: Licence) -> list[str]:
    found = ["whether the contract is what the model was trained with: compare a few answers with those of its own pipeline"]
    if named is None:
        found.append(f"the names of its classes{f' ({refused})' if refused else ''}: they are numbered; --labels FILE names them")
    if tried.energy:
        found.append(f"its energy: {tried.energy}; strange images are told by the largest probability alone")
    found += [f"the licence of its {name}" for name, value in vars(licence).items() if value == Licence().code]
    return found
