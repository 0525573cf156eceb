"""Read an ONNX classifier and rewrite it, in a process with limits: `python -m ebjdat_serve.importing.onnx_reader FOLDER`.

A graph may take any memory and time before it fails, and ONNX's converter and ONNX Runtime are C++ that a strange file can end. FOLDER
has request.json; the answer is answer.json, and of a whole reading served.onnx and answers.safetensors: what the graph gives as it is.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import save_file

import ebjdat_serve
from ebjdat_serve.engines import Floats
from ebjdat_serve.errors import EbjdatError, first_line
from ebjdat_serve.importing import images, labels
from ebjdat_serve.importing.onnx_file import read
from ebjdat_serve.importing.onnx_graph import (
    Head,
    Image,
    constants_lifted,
    dependent,
    head_of,
    image_of,
    opset,
    ordered,
    output_of,
    sizes_of,
)
from ebjdat_serve.importing.onnx_rewrite import Pixels, served_form
from ebjdat_serve.importing.onnx_run import exposed, off, run, served, session
from ebjdat_serve.listing import printable
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.selftest import TOLERANCE

MEMORY, SECONDS = 4 * 2**30, 600
"""Address space beside ten times the file, and processor time, that the reading of a graph may take."""
MOST_FEATURES = 2**14
"""A layer of more features is one of pixels still, whose covariance no calibration could hold."""
BATCHES = (8, 1, 3, 64)
"""Images at once that a rewritten graph is tried on: what servers give it is from one image to 64."""
SUM = 1e-3
SERVED, ANSWERS, REQUEST, ANSWER = "served.onnx", "answers.safetensors", "request.json", "answer.json"


@dataclass(frozen=True)
class Looked:
    """What a graph says of itself."""

    image: Image
    head: Head
    classes: int | None
    opset: int
    producer: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Tried:
    """What a graph turned out to be when it was run."""

    looked: Looked
    classes: int
    output: Literal["logits", "probabilities"]
    energy: str  # "" or why there is none
    features: int  # their number, 0 without
    freed: bool
    opset: int  # of the rewritten graph
    size: tuple[int, int]  # height and width of its images
    error: float  # of the rewritten graph against the original, relative


def look(model: onnx.ModelProto, layout: str = "", output: str = "") -> Looked:
    """Return what a graph says of itself; raise ValueError for one that is no image classifier, or where that is not clear."""
    image, name = image_of(model.graph, layout), output_of(model.graph, output)
    lifted = onnx.ModelProto()
    lifted.CopyFrom(model)
    constants_lifted(lifted.graph)
    nodes = ordered(lifted.graph, image.name, [name])
    pixels = dependent(nodes, image.name)
    if name not in pixels or name == image.name:
        raise ValueError(f"its output {name[:40]!r} does not depend on the image")
    sizes = next((sizes_of(value) for value in model.graph.output if value.name == name), None)
    known = [size for size in (sizes or [])[1:] if size]
    classes = math.prod(known) if sizes and len(known) == len(sizes) - 1 else None
    texts = {entry.key[:100]: entry.value for entry in model.metadata_props[:100] if len(entry.value) <= labels.LARGEST}
    by = "".join(letter for letter in model.producer_name[:40] if letter.isprintable())
    return Looked(image, head_of(lifted.graph, name, pixels), classes, opset(model), by, texts)


def size_of(image: Image, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the (height, width) of images, as wished where the graph leaves it open.

    Raises ValueError for a size that nobody says, or that is not the graph's.
    """
    found = []
    for name, wished, own in (("height", height, image.height), ("width", width, image.width)):
        if wished is not None and own is not None and wished != own:
            raise ValueError(f"the contract says a {name} of {wished}, the graph takes {own}")
        if (size := wished or own) is None:
            raise ValueError(f"it takes images of any {name}: give {name} in the contract")
        found.append(size)
    return found[0], found[1]


def attempt(model: onnx.ModelProto, looked: Looked, pixels: Pixels, size: tuple[int, int], folder: Path) -> Tried:
    """Run the graph as it is and rewritten, write both into ``folder``, and return what it is; raise ValueError where they differ."""
    about = looked.image
    tries = to_unit(images.made(*size))
    head, found = looked.head, _as_it_is(model, looked.head, tries, about, pixels)
    if head.ending and not _explained(found, head.ending):
        head = replace(head, logits=head.output, ending=head.ending if head.ending == "sigmoid" else "")
        found["logits"] = found["output"]
    output, energy = kind_of(found, head)
    expected = {"logits": found["logits"].reshape(len(tries), -1)}
    classes = expected["logits"].shape[1]
    if classes < 2:
        raise ValueError("it gives one number: a classifier gives two or more, one a class")
    if head.features:
        expected["features"] = pooled(found["features"], head)
        if expected["features"].shape[1] > MOST_FEATURES:
            head = replace(head, features="")
            del expected["features"]
    if not all(np.isfinite(values).all() for values in expected.values()):
        raise ValueError("for some image its output is not finite")
    names = [output, *([] if energy else ["energy"]), *(["features"] if head.features else [])]
    expected[output] = expected.pop("logits")

    def rewritten_to(freed: bool) -> onnx.ModelProto:
        return served_form(model, about, head, pixels, size, names, freed=freed)

    rewritten, freed, error = _for_any_batch(rewritten_to, tries, expected)
    (folder / SERVED).write_bytes(rewritten.SerializeToString())
    answers = {**expected, **({} if energy else {"energy": -logsumexp(expected[output])})}
    save_file({name: np.ascontiguousarray(values, np.float32) for name, values in answers.items()}, folder / ANSWERS)
    features = expected["features"].shape[1] if head.features else 0
    return Tried(replace(looked, head=head), classes, output, energy, features, freed, opset(rewritten), size, error)


def _as_it_is(model: onnx.ModelProto, head: Head, tries: Floats, about: Image, pixels: Pixels) -> dict[str, Floats]:
    content = exposed(model, head).SerializeToString()
    opened = session(content)
    del content
    return run(opened, tries, about, pixels, head)


def _explained(found: dict[str, Floats], ending: str) -> bool:
    """Return whether the output is the softmax, or its log, of what was found before it."""
    output, logits = (found[name].reshape(len(found[name]), -1).astype(np.float64) for name in ("output", "logits"))
    if ending == "sigmoid" or output.shape != logits.shape:
        return False
    shifted = logits - logits.max(axis=1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return bool(np.allclose(np.exp(log), np.exp(output) if ending == "log-softmax" else output, atol=TOLERANCE))


def kind_of(found: dict[str, Floats], head: Head) -> tuple[Literal["logits", "probabilities"], str]:
    """Return whether a graph's logits are logits or probabilities, and why they have no energy, "" if they have one."""
    logits = found["logits"].reshape(len(found["logits"]), -1)
    if head.ending == "sigmoid":
        raise ValueError("it ends in a sigmoid: its classes do not exclude each other, and each image is given one class here")
    if logits.min() >= 0 and np.abs(logits.sum(axis=1) - 1).max() < SUM:
        return "probabilities", "the graph gives probabilities, and the softmax that makes them cannot be cut off"
    with np.errstate(over="ignore"):
        if np.abs(np.exp(logits).sum(axis=1) - 1).max() < SUM:
            return "logits", "the graph gives log-probabilities, whose energy is always 0"
    return "logits", ""


def pooled(features: Floats, head: Head) -> Floats:
    """Return features as a graph's served form gives them, (N, F)."""
    means = features.mean(axis=tuple(range(2, features.ndim))) if head.pooled else features
    return means.reshape(len(features), -1)


def _for_any_batch(
    rewritten: Callable[[bool], onnx.ModelProto], tries: Floats, expected: dict[str, Floats]
) -> tuple[onnx.ModelProto, bool, float]:
    """Return the rewritten graph, whether its shapes were freed of a batch, and its largest error on batches of ``BATCHES`` images.

    Raises ValueError for a graph that gives something else for several images at once, or takes more memory than the process has.
    """
    why = ""
    for freed in (False, True):
        done = rewritten(freed)
        try:
            errors = [
                off(served(done, np.resize(tries, (n, *tries.shape[1:]))), {name: repeated(values, n) for name, values in expected.items()})
                for n in BATCHES
            ]
        except ValueError as error:
            why = str(error)
            continue
        if max(errors) <= TOLERANCE:
            return done, freed, max(errors)
        why = f"it answers otherwise, off by {max(errors):.1e}"
    raise ValueError(f"of several images at once {why}: export it with a dynamic batch")


def logsumexp(logits: Floats) -> NDArray[np.float64]:
    """Return log sum_y exp f(x)[y], (N,)."""
    exact = logits.astype(np.float64)
    most = exact.max(axis=1)
    total: NDArray[np.float64] = most + np.log(np.exp(exact - most[:, None]).sum(axis=1))
    return total


def repeated(values: Floats, n: int) -> Floats:
    """Return the first n of rows that are repeated without end."""
    return np.resize(values, (n, *values.shape[1:]))


# --- the process


def main(folder: Path) -> None:
    """Answer the request in ``folder``."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request: dict[str, Any] = json.loads((folder / REQUEST).read_bytes())
    for kind, most in ((resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_CPU, SECONDS)):
        resource.setrlimit(kind, (most, most))
    source = Path(request["source"])
    try:
        answer = _answer(request, source, folder)
    except EbjdatError as error:
        answer = {"refused": str(error)}
    except ValueError as error:
        answer = {"refused": f"{printable(source)}: {error}"}
    except MemoryError:
        answer = {"refused": f"{printable(source)}: reading it takes more than {request['memory'] // 2**20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 (ONNX's own libraries raise what they like on strange files)
        answer = {"refused": f"{printable(source)} cannot be read: {type(error).__name__}: {first_line(error)}"}
    (folder / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _answer(request: dict[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    model = read(source)
    looked = look(model, request["layout"], request["output"])
    if request["pixels"] is None:
        return asdict(looked)
    size = size_of(looked.image, request["height"], request["width"])
    return asdict(attempt(model, looked, Pixels(**request["pixels"]), size, folder))


def _asked(source: Path, folder: Path, **request: Any) -> dict[str, Any]:
    """Have a process of its own answer a request; raise EbjdatError for a source that is refused, or that ends the process."""
    size = source.stat().st_size if source.is_file() else 0
    beside = sum(
        512 * file.stat().st_blocks for file in source.parent.glob(f"{glob_escaped(source.name)}*") if file != source and file.is_file()
    )
    memory = MEMORY + 10 * min(size + beside, 2**31)
    (folder / REQUEST).write_text(json.dumps({"source": os.path.abspath(source), "memory": memory, **request}), encoding="utf-8")
    home = str(Path(ebjdat_serve.__file__).parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", "ebjdat_serve.importing.onnx_reader", str(folder)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if not (folder / ANSWER).is_file():
        raise EbjdatError(f"{printable(source)} cannot be read: {_ended(done, memory)}")
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_bytes())
    if "refused" in answer:
        raise EbjdatError(" ".join(answer["refused"].split()))
    return answer


def glob_escaped(name: str) -> str:
    """Return a file's name as a pattern of itself alone."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in name)


def _ended(done: "subprocess.CompletedProcess[bytes]", memory: int) -> str:
    if done.returncode == -signal.SIGXCPU or done.returncode == -signal.SIGKILL:
        return f"its graph takes more than {SECONDS} s to run on {images.TRIED} images, or was killed"
    if done.returncode < 0:
        return f"its graph ended the process that read it (signal {-done.returncode}), or takes more than {memory // 2**20} MiB"
    last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
    return f"the process that read it ended with status {done.returncode}: {last[:240]}"


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder for requests and what is read."""
    with tempfile.TemporaryDirectory(prefix="ebjdat-import-") as folder:
        yield Path(folder)


def looked_at(source: Path, layout: str = "", output: str = "") -> Looked:
    """Return what the graph in ``source`` says of itself; raise EbjdatError for one that is refused."""
    with workplace() as folder:
        return _looked(_asked(source, folder, layout=layout, output=output, pixels=None))


def tried_out(
    source: Path, folder: Path, pixels: Pixels, layout: str = "", output: str = "", height: int | None = None, width: int | None = None
) -> Tried:
    """Return what the graph in ``source`` is when run, SERVED and ANSWERS written into ``folder``; raise EbjdatError if refused."""
    found = _asked(source, folder, layout=layout, output=output, height=height, width=width, pixels=asdict(pixels))
    return Tried(**{**found, "looked": _looked(found["looked"]), "size": tuple(found["size"])})


def _looked(found: dict[str, Any]) -> Looked:
    return Looked(**{**found, "image": Image(**found["image"]), "head": Head(**found["head"])})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
