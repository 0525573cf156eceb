"""Turn a classifier of somebody else into a bundle: ``import_model``. One module for each kind of source; the server imports none of this.

Nothing of a source is executed: networks are built by the libraries that define them, ONNX by its own operators; ``python:`` sources are
code, and need ``allow_code``.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from safetensors.numpy import save_file

from ebjdat_serve import folder_prior
from ebjdat_serve.bundle import MANIFEST, Bundle, write_json
from ebjdat_serve.card import write_card
from ebjdat_serve.cpus import threads
from ebjdat_serve.engines import Floats, load_engine
from ebjdat_serve.errors import EbjdatError, cause, first_line, visible
from ebjdat_serve.folder_calibration import calibrate_folder, told
from ebjdat_serve.folder_images import listed_images
from ebjdat_serve.importing import images
from ebjdat_serve.importing.contract_file import Contract, read_contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.labels import checked, listed, numbered, read_labels
from ebjdat_serve.install import install
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import YES, Licence, Manifest, Provenance
from ebjdat_serve.pixels import decode, encode_png, to_unit
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.sgld import Sampler
from ebjdat_serve.verification import USUAL, verified

log = logging.getLogger("ebjdat_serve")
APART = 0.01
"""The most, of the spread of the logits, that a bundle's answers may be off from the source's own pipeline."""
STILL = Sampler(steps=1, step_size=0.0, grad_clip=0.0, noise_std=0.0)
"""The sampler of a bundle that draws nothing."""
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FORMS = "timm:NAME, a folder with config.json, python:package.module:callable, a .safetensors or .pt file, an .onnx file"


def import_model(
    source: str,
    out: Path,
    *,
    labels: Path | None = None,
    calibration: Path | None = None,
    prior: Path | None = None,
    folders: Mapping[str, str] | None = None,
    contract: Path | None = None,
    licence: Licence | None = None,
    allow_code: bool = False,
    say: Callable[[str], None] = log.info,
) -> Bundle:
    """Write the classifier ``source`` as a bundle in the new folder ``out``, self-tested, calibrated on the folder ``calibration`` if any.

    It draws if there are labelled images in a folder ``prior``; ``folders`` tells labels of sub-folders' names.
    ``say`` gets what was found and what could not be known before anything is written, then each step. Raises EbjdatError for a source
    that is refused or does not say what is needed, and for an ``out`` that exists; nothing is left of a bundle that was not finished.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise EbjdatError(f"{printable(out)} exists already: name a folder that does not")
    if calibration:
        listed_images(calibration)  # before the work that a folder of too few would waste
    described = read_contract(contract) if contract else None
    named = read_labels(labels) if labels else None
    say(f"reading {source}")
    with strange(source):
        found = source_of(source).find(source, labels=named, contract=described, licence=licence, allow_code=allow_code)
        if found.labels:
            checked(found.labels, len(found.labels), "the source")  # before anything of them is shown
    if prior:
        if isinstance(found.graph, bytes):
            raise EbjdatError(f"{printable(source)} draws nothing, with a prior or without: {found.capabilities.gradient}")
        folder_prior.labelled(prior, found.labels or numbered(classes_of(found)), folders or {})
        found = replace(found, capabilities=replace(found.capabilities, generate=f"a prior is to be fitted to {printable(prior)}"))
    for line in summary(found):
        say(visible(line))
    temporary = out.with_name(f".importing-{out.name}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with strange(source):
            image = to_unit(images.made(found.input.height, found.input.width))  # a folder's own would be published with the bundle
            bundle = written(found, temporary, described, image, say)
            compared(found, bundle, say)
        if calibration:
            say(f"calibrating on {printable(calibration)}")
            bundle = calibrate_folder(bundle, calibration, folders=folders, say=say)
            for line in told(bundle):
                say(line)
        if prior:
            say(f"fitting a prior to {printable(prior)}")
            bundle = folder_prior.prior_folder(bundle, prior, folders=folders, say=say)
            for line in folder_prior.told(bundle):
                say(line)
        write_card(bundle)
        say("checking it as a server does")
        verified(bundle.path, USUAL, FUNCTIONS)
        temporary.rename(out)
    except OSError as error:
        raise EbjdatError(f"{printable(out)} cannot be written: {cause(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.load(out)


@contextmanager
def strange(source: str) -> Iterator[None]:
    """Turn whatever a library raises of a strange source into EbjdatError, in one line."""
    try:
        yield
    except (EbjdatError, OSError):
        raise
    except Exception as error:  # what libraries raise of files that nobody meant to write has no common base
        raise EbjdatError(f"{printable(source)} is not imported: {type(error).__name__}: {first_line(error)}") from error


class SourceModule(Protocol):
    """A module that reads one kind of source."""

    def find(self, source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
        """Return the classifier that ``source`` is. Raises EbjdatError."""


def source_of(source: str) -> SourceModule:
    """Return the module that reads a kind of source; raise EbjdatError for a source of no known kind, or whose packages are missing."""
    path = Path(source)
    if source.startswith(("timm:", "python:")):
        kind = {"timm": "timm", "python": "python_code"}[source.partition(":")[0]]
    elif (path / "config.json").is_file():
        kind = "hugging_face"
    elif path.suffix.lower() == ".onnx":
        kind = "onnx_source"
    elif path.suffix.lower() in CHECKPOINTS:
        kind = "checkpoint"
    else:
        what = "is no source that is known" if path.is_file() else "does not exist"
        if path.is_dir():
            what = "is a bundle already" if (path / MANIFEST).is_file() else "is a folder without config.json"
        raise EbjdatError(f"{printable(source)} {what}: give {FORMS}")
    needed = "onnx" if kind == "onnx_source" else "torch"
    if find_spec(needed) is None:
        raise EbjdatError(f"import needs {needed}: {install('import')}")
    if find_spec(f"{__name__}.{kind}") is None:
        raise EbjdatError(f"this version does not import {kind.replace('_', ' ')} sources")
    return cast(SourceModule, import_module(f"{__name__}.{kind}"))


def summary(found: Found) -> list[str]:
    """Return what was found and what could not be known, in lines."""
    able = [name for name, why in vars(found.capabilities).items() if why == YES]
    lacking = [f"  no {name}: {why}" for name, why in vars(found.capabilities).items() if why != YES]
    lines = [f"{found.name} ({found.source})", *(f"  {line}" for line in found.said)]
    lines += [f"  input: {found.input.described()}"]
    lines += [f"  labels: {listed(found.labels)}" if found.labels else "  labels: none"]
    lines += [f"  gives {', '.join([found.output, *able])}", *lacking]
    lines += [f"  licence of the {name}: {value}" for name, value in vars(found.licence).items()]
    return [*lines, "not known:", *(f"  {line}" for line in found.unknown or ["nothing that matters"])]


def compared(found: Found, bundle: Bundle, say: Callable[[str], None]) -> None:
    """Raise EbjdatError unless the bundle answers as the source's own pipeline does: equal labels, logits to 1 % of their spread.

    On images that are smaller, larger and longer than the network's; a source without a pipeline, such as an ONNX file, has nothing to
    compare with.
    """
    if found.reference is None:
        return
    say("comparing with the source's own pipeline")
    size, engine = found.input, load_engine(bundle, "onnx", "cpu", threads())
    data = [encode_png(images.made(high, wide, 1)[0]) for high, wide in images.sizes(size.height, size.width)]
    ours = np.concatenate([engine.classify(to_unit(decode(one, size)[None])).logits for one in data])
    theirs = np.stack([found.reference(one) for one in data])
    off = float(np.abs(ours - theirs).max() / max(float(np.ptp(theirs)), 1e-12))
    if not off <= APART or (ours.argmax(axis=1) != theirs.argmax(axis=1)).any():
        raise EbjdatError(
            f"{printable(found.source)} prepares its images as no contract says: on images of other sizes logits differ from its own "
            f"pipeline's by {off:.1%} of their spread, more than {APART:.0%}; export it to ONNX, and write a contract for it"
        )


def written(found: Found, folder: Path, contract: Contract | None, image: Floats, say: Callable[[str], None]) -> Bundle:
    """Write manifest, weights, graphs and self-test into ``folder``."""
    labels = checked(found.labels, len(found.labels), "the source") if found.labels else numbered(classes_of(found))
    write_json(folder / MANIFEST, asdict(manifest_of(found, labels, contract)))
    draft = Bundle.draft(folder)
    say("writing weights and graphs")
    if isinstance(found.graph, bytes):
        from ebjdat_serve.importing.onnx_source import FoundGraph
        from ebjdat_serve.importing.onnx_weights import write_graph

        assert isinstance(found, FoundGraph)
        about = {"name": draft.manifest.name, "version": draft.manifest.version, "precision": "fp32"}
        draft = draft.update(*write_graph(found.graph, folder, about))
        # asked where the file was read, in a process with limits, on the same images
        save_file({"image": image, "label": np.full(len(image), -1), **found.answers}, folder / "selftest.safetensors")
        (folder / "selftest.safetensors").chmod(0o644)
        draft = draft.update("selftest.safetensors")
    else:
        from ebjdat_serve.importing import network_files

        draft = network_files.write(found.graph, draft, image, say)
    return draft


def classes_of(found: Found) -> int:
    """Return the number of classes of a model whose labels are not known."""
    return int(getattr(found if isinstance(found.graph, bytes) else found.graph, "classes"))  # noqa: B009


def manifest_of(found: Found, labels: list[str], contract: Contract | None) -> Manifest:
    """Return the manifest of a bundle without files; its version is the date and a hash of the source, its labels and contract."""
    now = datetime.now(UTC)
    said = {name: value for name, value in asdict(contract).items() if name != "labels" and value} if contract else {}
    digest = hashlib.sha256(json.dumps([labels, said, asdict(found.input), found.architecture], sort_keys=True).encode())
    if isinstance(found.graph, bytes):
        digest.update(found.graph)
    else:
        for tensor in found.graph.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return Manifest(
        name=(re.sub(r"[^A-Za-z0-9._+-]+", "-", found.name).strip("-._+") or "imported")[:100],
        version=f"{now:%Y.%m.%d}-{digest.hexdigest()[:8]}",
        architecture=found.architecture,
        labels=labels,
        input=found.input,
        sampler=STILL,
        provenance=Provenance(
            git="",
            preset="import",
            seed=0,
            dataset="unknown",
            data_sha256="",
            steps=0,
            planned_steps=0,
            rollbacks=0,
            init_sha256="",
            started=now.isoformat(timespec="seconds"),
            configuration={"source": found.source, "contract": said, "found": found.said, "unknown": found.unknown},
        ),
        files={},
        output=found.output,
        capabilities=found.capabilities,
        licence=found.licence,
    )


__all__ = ["Found", "import_model"]
