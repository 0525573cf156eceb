"""`ebjdat-serve import SOURCE OUT`: a classifier of somebody else as a bundle."""

import argparse
import os
import shlex
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebjdat_serve.bounds import LONGEST_LABEL
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.install import install
from ebjdat_serve.manifest import Licence

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = "docs/import.md has the contract file, and a page for each kind of source. The server needs none of what import needs."


def add(commands: "Commands") -> None:
    """Add the command to the parsers of `ebjdat-serve`."""
    parser = commands.add_parser("import", help="turn a classifier of your own into a bundle", epilog=EPILOG)
    parser.add_argument("source", help="timm:NAME, a folder with config.json, python:package.module:callable, .safetensors, .pt or .onnx")
    parser.add_argument("out", nargs="?", type=Path, help="the bundle, a folder that does not exist yet")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class labels: one a line, or JSON (what the source says)")
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="images like those that the model will see: p-values need them")
    parser.add_argument("--prior", type=Path, metavar="DIR", help="images in sub-folders named as labels: /generate starts from them")
    parser.add_argument("--folders", type=Path, metavar="FILE", help="JSON object: labels by the names of sub-folders of both")
    parser.add_argument(
        "--contract", type=Path, metavar="FILE", help="how an image becomes pixels, where the source does not say it (JSON)"
    )
    parser.add_argument("--write-contract", type=Path, metavar="FILE", help="only write a contract to fill in, for an .onnx file")
    parser.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="SPDX",
        help="licence of the weights; code=SPDX and data=SPDX are those of code and training data (may be repeated)",
    )
    parser.add_argument("--allow-code", action="store_true", help="run code of the source: python: sources need it; serving never does")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    """Import a source, or write a contract for it."""
    if find_spec("onnx") is None:
        raise EbjdatError(f"import needs packages that serving does not: {install('import')}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ebjdat_serve.engines import check_onnxruntime

    check_onnxruntime()
    if options.write_contract:
        _write_contract(options)
        return
    if options.out is None:
        raise EbjdatError("name the folder to write the bundle into: ebjdat-serve import SOURCE OUT")
    from ebjdat_serve.folder_images import read_folders
    from ebjdat_serve.importing import import_model
    from ebjdat_serve.importing.contract_file import read_contract

    said = read_contract(options.contract).licence if options.contract else Licence()
    import_model(
        options.source,
        options.out,
        labels=options.labels,
        calibration=options.calibration,
        prior=options.prior,
        folders=read_folders(options.folders),
        contract=options.contract,
        licence=licence_of(options.license, said) if options.license else None,
        allow_code=options.allow_code,
        say=lambda line: print(line, flush=True),
    )
    print(f"serve it: ebjdat-serve serve {shlex.quote(str(options.out))}")


def _write_contract(options: argparse.Namespace) -> None:
    from ebjdat_serve.importing.contract_file import ASKED
    from ebjdat_serve.importing.onnx_source import write_template

    if not options.source.lower().endswith(".onnx"):
        raise EbjdatError(f"{options.source} needs no contract file to begin with: only .onnx files say nothing of their pixels")
    write_template(options.source, options.write_contract)
    print(f"{options.write_contract}: fill in {', '.join(ASKED)}, then give it as --contract")


def licence_of(given: list[str], said: Licence) -> Licence:
    """Return ``said`` with the licences of --license; raise EbjdatError for one of something else than code, weights and data."""
    changes: dict[str, Any] = {}
    for text in given:
        what, equals, name = text.partition("=")
        what, name = (what, name) if equals else ("weights", text)
        if what not in [one.name for one in fields(Licence)] or not name.strip():
            raise EbjdatError(f"--license {text[:40]}: give SPDX, the licence of the weights, or code=, weights= or data= and one")
        if len(name) > LONGEST_LABEL or not name.isprintable():
            raise EbjdatError(f"--license {text[:40]!r}: a licence is one line of {LONGEST_LABEL} characters at most")
        if what in changes:
            raise EbjdatError(f"--license: the licence of the {what} is given twice")
        changes[what] = name.strip()
    return replace(said, **changes)
