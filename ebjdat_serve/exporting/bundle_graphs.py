"""Write the graphs of a bundle.

    classify.onnx   image (N, 3, H, W) -> logits (N, K), energy (N,), features (N, F), which the head takes
    score.onnx      image, label (N,)  -> score (N, 3, H, W) = -dE(x,y)/dx, energy (N,); label -1 is the marginal
    step.onnx       image, label, key (N, 4, 4), step, step_size, grad_clip, noise_std (N,)
                    -> next_image, energy = E(x,y) before the step, next_step: one Langevin step, its noise made in the graph

The graphs hold no weights: their initialisers point into weights.safetensors by byte offset.
"""

import logging
from dataclasses import replace

import onnx
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ebjdat_serve.bundle import GRAPHS, Bundle, graph_name
from ebjdat_serve.engines import Precision
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.exporting.functions import INPUTS, Graphs
from ebjdat_serve.exporting.onnx_files import finish
from ebjdat_serve.exporting.reference import write_selftest

log = logging.getLogger("export")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


def export(bundle: Bundle) -> Bundle:
    """Write the graphs into ``bundle`` and record them; raise EbjdatError when a constant is not in the weights file."""
    bundle = without_strangers(bundle)
    return bundle.update(*(write(bundle, function, "fp32") for function in INPUTS))


def export_again(bundle: Bundle) -> Bundle:
    """Write the graphs, and what torch says of the self-test's images by the weights that the bundle has now."""
    file = bundle.path / "selftest.safetensors"
    if not file.is_file():
        raise EbjdatError(f"{bundle.path} has no {file.name}, which training writes: train again")
    try:
        image = load_file(file)["image"]
    except (SafetensorError, KeyError) as error:
        raise EbjdatError(f"{file} cannot be read ({error}): train again") from error
    exported = export(bundle)
    write_selftest(exported, image)
    return exported.update(file.name)


def without_strangers(bundle: Bundle) -> Bundle:
    """Return ``bundle`` without lower-precision graphs of other weights, which would silently run with the new ones."""
    weights, strangers = bundle.manifest.files["weights.safetensors"].sha256, []
    for name in bundle.manifest.files:
        if name.endswith(".onnx") and name not in GRAPHS:
            model = onnx.load(bundle.path / name, load_external_data=False)
            if weights not in (entry.value for entry in model.metadata_props):
                strangers.append(name)
                log.warning("%s is of other weights and is dropped: training/precision.py creates it again", name)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name not in strangers}
    return Bundle(bundle.path, replace(bundle.manifest, files=files))


def write(bundle: Bundle, function: str, precision: Precision) -> str:
    """Write the graph of one function, its blocks in fp32 or fp16, the rest in fp32, and return the file's name."""
    file, m = graph_name(function, precision), bundle.manifest
    model = Graphs(load_model(bundle), m.input.height, m.input.width, DTYPES[precision])(function)
    finish(model, bundle.path / file, title(bundle, precision))
    return file


def title(bundle: Bundle, precision: str) -> dict[str, str]:
    """Return a graph's metadata."""
    m = bundle.manifest
    return {"name": m.name, "version": m.version, "weights": m.files["weights.safetensors"].sha256, "precision": precision}
