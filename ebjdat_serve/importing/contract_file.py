"""The contract file of ``import --contract``: what a source does not say of itself, as strict JSON.

ONNX has no standard for how an image becomes a tensor, so that its contract has to say it; sources that say it themselves need none.
docs/import.md has the table of its keys.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ebjdat_serve.bounds import Bounds
from ebjdat_serve.bundle import parse_json, read_bytes, write_json
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.manifest import Input, Licence
from ebjdat_serve.parsing import parse

LARGEST = 2**20
VALUE, POSITIVE = Bounds(-1e6, 1e6), Bounds(1e-6, 1e6)
ASKED = ("resize", "filter", "channel_order", "scale", "mean", "std")
"""What nobody can tell from a graph; null in a template."""
INPUT = {one.name: one.default for one in fields(Input)}
"""Keys of the contract that go into bundle.json as they are, with their defaults."""


@dataclass(frozen=True)
class Contract:
    """What a contract file says. A model takes ``(pixel in [0,1] * scale - mean) / std``, in the order of its channels.

    Sizes and layout may be left out where the graph says them, the output where it has one alone.
    """

    input: dict[str, Any]  # of INPUT, those that are given
    channel_order: Literal["RGB", "BGR"] | None = None
    scale: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    layout: str = ""
    labels: list[str] | None = None
    output: str = ""
    licence: Licence = field(default_factory=Licence)

    def missing(self) -> list[str]:
        """Return the keys of ASKED that the file does not say."""
        return [name for name in ASKED if self.input.get(name, getattr(self, name, None)) is None]

    def input_of(self, height: int, width: int) -> Input:
        """Return the input contract of images of the given size; raise BundleError for values out of bounds."""
        defaults = {name: default for name, default in INPUT.items() if default is not MISSING}
        return parse(Input, {**defaults, **self.input, "height": height, "width": width}, "contract")

    def size(self, name: str) -> int | None:
        """Return a wished height or width; raise EbjdatError for one that is no number of pixels."""
        value = self.input.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096):
            raise EbjdatError(f"contract: {name} must be 1 to 4096 pixels, not {str(value)[:40]}")
        return value


@dataclass(frozen=True)
class _Rest:
    """Keys of a contract file beside those of the input."""

    channel_order: Literal["RGB", "BGR"]
    scale: Annotated[float, POSITIVE]
    mean: list[Annotated[float, VALUE]]
    std: list[Annotated[float, POSITIVE]]
    layout: Literal["NCHW", "NHWC"]
    labels: list[str]
    output: str
    licence: Licence


def read_contract(file: Path) -> Contract:
    """Return what a contract file says; raise EbjdatError for one that is no JSON object, has unknown keys or values of a wrong kind."""
    data = parse_json(read_bytes(file, LARGEST), file)
    if not isinstance(data, dict):
        raise EbjdatError(f"{file}: expected an object, found {type(data).__name__}")
    data = {name: value for name, value in data.items() if value is not None}
    rest = {name: data.pop(name) for name in [one.name for one in fields(_Rest)] if name in data}
    if unknown := sorted(set(data) - set(INPUT)):
        raise EbjdatError(f"{file}: unknown keys {unknown}; known are {', '.join([*INPUT, *(one.name for one in fields(_Rest))])}")
    if isinstance(rest.get("licence"), dict):
        rest["licence"] = asdict(Licence()) | rest["licence"]
    filler: dict[str, Any] = {
        "channel_order": "RGB",
        "scale": 1.0,
        "mean": [],
        "std": [],
        "layout": "NCHW",
        "labels": [],
        "output": "",
        "licence": asdict(Licence()),
    }
    checked = parse(_Rest, filler | rest, str(file))
    for name in ("mean", "std"):
        if name in rest and len(rest[name]) != 3:
            raise EbjdatError(f"{file}: {name} must be of 3 numbers, one a channel, not {len(rest[name])}")
    return Contract(input=data, **{name: getattr(checked, name) for name in rest})


def template(**known: Any) -> dict[str, Any]:
    """Return a contract with what is ``known`` filled in, what must be filled in as null, and the rest as it is without a contract."""
    rest = {"layout": None, "output": None, "labels": None, "licence": asdict(Licence())}
    defaults = {name: None if default is MISSING or name in ASKED else default for name, default in INPUT.items()}
    return defaults | dict.fromkeys(ASKED) | rest | {name: value for name, value in known.items() if value}


def write_template(file: Path, **known: Any) -> None:
    """Write a contract to fill in; raise EbjdatError for a file that is there already."""
    if file.exists():
        raise EbjdatError(f"{file} exists already: name a file that does not")
    write_json(file, template(**known))


def as_line(names: list[str]) -> str:
    """Return keys of a contract as they are written, with values that most models have."""
    usual = {
        "resize": "shorter",
        "filter": "bilinear",
        "channel_order": "RGB",
        "scale": 1.0,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    return json.dumps({name: usual[name] for name in names})
