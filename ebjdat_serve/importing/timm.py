"""A model of timm as a source of ``ebjdat-serve import``: ``timm:NAME``, or ``timm:NAME@FILE`` with weights of one's own."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ebjdat_serve.bounds import LONGEST_LABEL
from ebjdat_serve.errors import EbjdatError, first_line, visible
from ebjdat_serve.importing.checkpoint import load_into, read_tensors
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.torch_source import found, licence_of, told_itself
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import Input, Licence
from ebjdat_serve.networks import Normalisation, TimmArchitecture, package

MOST_CLASSES = 2**17
"""Classes of a checkpoint; ImageNet-21k has 21,843."""
FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear", "nearest": "nearest", "lanczos": "lanczos", "box": "area", "random": "bilinear"}
"""timm's names of filters; ``random`` is of training, and bilinear where images are only classified."""


def find(source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
    """Return a model of timm by its name there, pretrained, or with the weights of ``@FILE``; its own configuration says the input.

    Raises EbjdatError for a name that timm does not know, and where timm is missing or cannot fetch the weights.
    """
    name, _, file = source.removeprefix("timm:").partition("@")
    try:
        TimmArchitecture(name)
    except ValueError as error:
        raise EbjdatError(str(error)) from error
    told_itself(contract, "timm")
    labels = labels or (contract.labels if contract else None)
    timm = package("timm", "timm")
    if not timm.is_model(name):
        raise EbjdatError(f"timm {timm.__version__} has no model {name!r}: timm.list_models(pretrained=True) lists them")
    model = with_weights(timm, name, Path(file)) if file else pretrained(timm, name)
    configuration: dict[str, Any] = timm.data.resolve_data_config({}, model=model)
    about: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    named, where = (labels, "") if labels else labels_of(timm, model)
    return found(
        model,
        TimmArchitecture(name, normalisation=normalisation_of(configuration)),
        name=name,
        source=source.partition("@")[0],
        size=input_of(configuration),
        labels=named,
        licence=licence_of(licence, contract, code="Apache-2.0", weights="" if file else about.get("license")),
        reference=reference(timm, model.eval(), configuration),
        said=[f"timm {timm.__version__}: {name}", *([f"weights: {visible(Path(file).name)}"] if file else []), *([where] if where else [])],
        unknown=[f"whether the classes of {visible(Path(file).name)} are those that its labels name"] if file and where else [],
    )


def with_weights(timm: Any, name: str, file: Path) -> nn.Module:
    """Return a model with the weights of a checkpoint, of as many classes as its last layer has there; raise EbjdatError if they misfit."""
    tensors = read_tensors(file)
    model: nn.Module = timm.create_model(name, pretrained=False)
    last = classifier(model)
    held = tensors.get(f"{last}.weight")
    if held is not None and held.dim() and len(held) != model.num_classes:
        if not 2 <= len(held) <= MOST_CLASSES:
            raise EbjdatError(f"{printable(file)}: {last}.weight is of {len(held)} classes: two to {MOST_CLASSES} are imported")
        model = timm.create_model(name, pretrained=False, num_classes=len(held))
    return load_into(model, tensors, file, f"timm:NAME@FILE takes a state_dict of {name}: timm.list_models() has the names of others")


def classifier(model: nn.Module) -> str:
    """Return the name of a model's last layer; of several, as a distilled one has, the first."""
    named: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ""
    return str(named) if isinstance(named, str) else str(next(iter(named), ""))


def pretrained(timm: Any, name: str) -> nn.Module:
    """Return the pretrained model; raise EbjdatError where timm has or reaches no weights of it."""
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise EbjdatError(f"timm has no weights of {name} here: {why}; timm:{name}@FILE takes a checkpoint of yours") from error
    return model


def normalisation_of(configuration: Mapping[str, Any]) -> Normalisation:
    """Return the mean and std of a data configuration, of pixels in [0,1]."""
    return Normalisation(1.0, [float(value) for value in configuration["mean"]], [float(value) for value in configuration["std"]])


def input_of(configuration: Mapping[str, Any]) -> Input:
    """Return the input contract of a data configuration, as timm's transforms for evaluation; raise EbjdatError for one that has none."""
    channels, height, width = configuration["input_size"]
    kind, mode = configuration["interpolation"], configuration.get("crop_mode") or "center"
    if channels != 3 or kind not in FILTERS or mode not in ("center", "squash", "border"):
        raise EbjdatError(f"timm resizes for this model as no contract says: {channels} channels, {kind}, crop mode {mode}")
    resize = {"center": "shorter" if height == width else "cover", "squash": "squash", "border": "pad"}[mode]
    colour = "#" + "".join(f"{round(255 * value):02x}" for value in configuration["mean"]) if mode == "border" else "#000000"
    crop = float(configuration["crop_pct"] or 1.0)
    # of unequal sides timm passes no interpolation on, and its default is bilinear
    chosen = "bilinear" if resize == "cover" else FILTERS[kind]
    return Input(height, width, resize, chosen, crop, "round", colour)  # type: ignore[arg-type]


def labels_of(timm: Any, model: nn.Module) -> tuple[list[str] | None, str]:
    """Return the labels of the part of ImageNet that a model was trained on, by timm's own tables, and where they are from."""
    subset = timm.data.infer_imagenet_subset(model)
    if not subset:
        return None, ""
    said = timm.data.ImageNetInfo(subset).label_descriptions()
    return [label[:LONGEST_LABEL].strip() for label in said], f"labels: those of {subset}, by the number of classes"


def reference(timm: Any, model: nn.Module, configuration: Mapping[str, Any]) -> Callable[[bytes], NDArray[np.float32]] | None:
    """Return timm's own pipeline from an encoded image to logits (K,), None where its transforms do not load."""
    try:
        transform = timm.data.create_transform(**configuration, is_training=False)
    except (ImportError, RuntimeError, TypeError):
        return None

    def run(encoded: bytes) -> NDArray[np.float32]:
        with Image.open(io.BytesIO(encoded)) as image, torch.no_grad():
            logits: NDArray[np.float32] = model(transform(image.convert("RGB"))[None])[0].numpy()
        return logits

    return run
