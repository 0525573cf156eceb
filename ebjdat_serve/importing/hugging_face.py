"""A folder of Hugging Face transformers as a source of ``ebjdat-serve import``: config, preprocessor, safetensors; no code."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebjdat_serve.bundle import parse_json, read_bytes
from ebjdat_serve.contract import crop_of
from ebjdat_serve.errors import EbjdatError, first_line, visible
from ebjdat_serve.importing.checkpoint import misfit, shapes
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.cost import check_cost, planned
from ebjdat_serve.importing.found import Found
from ebjdat_serve.importing.torch_source import found, licence_of, told_itself
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import Input, Licence
from ebjdat_serve.networks import HuggingFaceArchitecture, Normalisation, config_fault, huggingface_config, package

LARGEST_JSON, LARGEST_CARD, LARGEST_WEIGHTS = 4 * 2**20, 2**16, 8 * 2**30
MOST_LAYERS, MOST_SIZE, MOST_NUMBERS = 1000, 2**17, 1000
LAYERS = re.compile("layers|depths?$|blocks|stages|repeat")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "area"}
"""Pillow's numbers of filters."""
UNTOLD = 2
"""Classes of a config that says nothing of them, as transformers takes it."""
FOLDER_FILES = ("config.json", "preprocessor_config.json")


def find(source: str, *, labels: list[str] | None, contract: Contract | None, licence: Licence | None, allow_code: bool) -> Found:
    """Return the image classifier in a folder as ``save_pretrained`` writes it. ``allow_code`` changes nothing.

    Raises EbjdatError for a folder that brings code, has weights as pickles alone, or is of no image classifier.
    """
    folder = Path(source)
    config, _ = (checked_json(folder / name) for name in FOLDER_FILES)
    check_config(config, folder)
    check_weights(folder)
    told_itself(contract, "the folder")
    labels = labels or (contract.labels if contract else None)
    transformers = package("transformers", "huggingface")
    transformers.logging.set_verbosity_error()  # its reports repeat names of the file, whatever they hold
    kept = huggingface_config(config)
    architecture = HuggingFaceArchitecture(kept)
    processor = processor_of(transformers, folder)
    size, normalisation = input_of(processor), normalisation_of(processor)
    names = label_names(config)
    module = loaded(transformers, folder, kept, len(names), size)
    own = None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
    return found(
        module,
        HuggingFaceArchitecture(architecture.config, normalisation=normalisation),
        name=folder.resolve().name,
        source=printable(folder.resolve().name),
        size=size,
        labels=labels or own,
        licence=licence_of(licence, contract, code="Apache-2.0", weights=card_licence(folder)),
        reference=reference(processor, module),
        said=[
            f"transformers {transformers.__version__}: {type(module).__name__}, {config['model_type']}",
            f"input: {type(processor).__name__} of preprocessor_config.json",
        ],
        unknown=[],
    )


def checked_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a folder; raise EbjdatError for one that names code of its own."""
    if not file.is_file():
        raise EbjdatError(f"{printable(file)} is missing: save_pretrained of the model and of its image processor write what is needed")
    data = parse_json(read_bytes(file, LARGEST_JSON), file)
    if not isinstance(data, dict):
        raise EbjdatError(f"{printable(file)} is no JSON object")
    if file.name == "config.json" and (fault := config_fault(data)):
        raise EbjdatError(f"{printable(file)} {fault}")
    if data.get("auto_map"):
        raise EbjdatError(f"{printable(file)} has auto_map: code that a folder brings is never run")
    return data


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise EbjdatError for a config of no image classifier, or of sizes that no classifier has."""
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if not isinstance(config.get("model_type"), str) or not isinstance(kind, str) or "ForImageClassification" not in kind:
        raise EbjdatError(f"{printable(folder)} is of {str(kind)[:60]}, no image classifier (…ForImageClassification)")

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and name not in ("id2label", "label2id"):
            for key, part in value.items():
                walk(str(key), part)
        elif isinstance(value, list):
            if len(value) > MOST_NUMBERS:
                raise EbjdatError(f"{printable(folder)}: config.json: {name[:60]!r} has {len(value)} values")
            if LAYERS.search(name) and sum(part for part in value if isinstance(part, int)) > MOST_LAYERS:
                raise EbjdatError(f"{printable(folder)}: config.json: {name[:60]!r} has more than {MOST_LAYERS} in all")
            for part in value:
                walk(name, part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = MOST_LAYERS if LAYERS.search(name) else MOST_SIZE
            if not abs(value) <= most:
                raise EbjdatError(f"{printable(folder)}: config.json: {name[:60]!r} is {value}, more than {most}")

    walk("", config)


def check_weights(folder: Path) -> None:
    """Raise EbjdatError unless the folder has its weights as safetensors, within its own folder, of a bounded size."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        why = f"only {pickles[0]}, a pickle, which is never read: save_pretrained writes safetensors" if pickles else "no *.safetensors"
        raise EbjdatError(f"{printable(folder)} has {why}")
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        if not index.is_file():
            raise EbjdatError(f"{printable(index)} is no file")
        shards = parse_json(read_bytes(index, LARGEST_JSON), index)
        named = shards.get("weight_map") if isinstance(shards, dict) else None
        if not isinstance(named, dict) or not set(map(str, named.values())) <= {file.name for file in files}:
            raise EbjdatError(f"{printable(index)} names weights that are no *.safetensors of the folder")
    home = folder.resolve()
    if any(file.resolve().parent != home for file in files):
        raise EbjdatError(f"{printable(folder)}: its weights are links that leave the folder: put the files themselves there")
    if sum(file.stat().st_size for file in files) > LARGEST_WEIGHTS:
        raise EbjdatError(f"{printable(folder)}: its weights have more than {LARGEST_WEIGHTS} bytes")


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Return the labels of a config by class, LABEL_0 and so on where it only counts them, none where it does neither.

    Raises EbjdatError where they are not of 0 to K - 1.
    """
    named = config.get("id2label")
    if not isinstance(named, dict):
        count = config.get("num_labels")
        return [f"LABEL_{i}" for i in range(count)] if isinstance(count, int) and 1 < count <= MOST_SIZE else []
    labels = [named.get(str(i)) for i in range(len(named))]
    if not all(isinstance(label, str) for label in labels) or len(labels) < 2:
        raise EbjdatError("config.json: id2label must name each class from 0 on, two or more")
    return [str(label).strip() for label in labels]


def loaded(transformers: Any, folder: Path, config: dict[str, Any], classes: int, size: Input) -> nn.Module:
    """Return the model with every weight of the folder, of as many classes as config.json says, or where it does not as the weights have.

    Raises EbjdatError for one that would take more memory or time than any classifier, before it is built, and for weights that misfit.
    """
    held = shapes_of(folder)
    try:
        told, wanted = looked_through(transformers, folder, config, classes, size, held)
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder, config=told, local_files_only=True, trust_remote_code=False, use_safetensors=True, attn_implementation="eager",
            dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,  # they are told, and refused here
        )  # fmt: skip
    except EbjdatError as error:
        raise EbjdatError(f"{printable(folder)}: {error}") from error
    except Exception as error:
        raise EbjdatError(f"{printable(folder)} is not read by transformers: {type(error).__name__}: {first_line(error)}") from error
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        why = misfit(wanted, held) or visible(lacking[0][:100])
        raise EbjdatError(f"{printable(folder)}: the weights do not fit config.json: {why}")
    made: nn.Module = model
    return made


def looked_through(
    transformers: Any, folder: Path, config: dict[str, Any], classes: int, size: Input, held: Mapping[str, tuple[int, ...]]
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return transformers' config, its number of classes settled, and the shapes of the network's tensors, all of it by arithmetic alone.

    ``classes`` are those that config.json says, 0 if it does not; ``held`` the shapes of the weights. Raises EbjdatError.
    """

    def plan(number: int) -> tuple[Any, nn.Module]:
        sizes = {name: part for name, part in config.items() if name != "model_type"}
        told = transformers.AutoConfig.for_model(config["model_type"], **sizes)
        told.num_labels = number
        auto = transformers.AutoModelForImageClassification
        return told, planned(lambda: auto.from_config(told, attn_implementation="eager", trust_remote_code=False))

    told, network = plan(classes or UNTOLD)
    last, own = classes_held(network, held, classes or UNTOLD)
    if classes and own not in (0, classes):
        raise EbjdatError(f"{last} is of {own} classes, and config.json of {classes}: give it num_labels or an id2label of {own}")
    if own > 1 and not classes:
        told, network = plan(own)
    bytes_, wanted = sum(file.stat().st_size for file in folder.glob("*.safetensors")), shapes(dict(tensors_of(network)))
    if (most := sum(map(prod, wanted.values()))) > bytes_:
        raise EbjdatError(f"config.json asks for {most} parameters, its weights have {bytes_} bytes")
    check_cost(network, size.height, size.width)
    return told, wanted


def tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a network by name."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a folder's safetensors, by their headers; raise EbjdatError for a damaged file."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise EbjdatError(f"{printable(file)} cannot be read: {first_line(error)}") from error
    return found


def classes_held(network: nn.Module, held: Mapping[str, tuple[int, ...]], classes: int) -> tuple[str, int]:
    """Return the weight of the last layer of a network of ``classes`` classes and the classes that a file's tensor of that name has.

    "" and 0 where it is not found.
    """
    for name, layer in reversed(list(network.named_modules())):
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == classes and held.get(f"{name}.weight"):
            return f"{name}.weight", held[f"{name}.weight"][0]
    return "", 0


def processor_of(transformers: Any, folder: Path) -> Any:
    """Return the image processor of a folder, that of Pillow; raise EbjdatError where transformers knows none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")
    except Exception as error:
        raise EbjdatError(f"{printable(folder)}: no image processor: {type(error).__name__}: {first_line(error)}") from error


def normalisation_of(processor: Any) -> Normalisation:
    """Return what a processor does to values, on pixels in [0,1]."""
    scale = 255 * float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", False):
        mean, std = ([float(value) for value in spread(part)] for part in (processor.image_mean, processor.image_std))
    if getattr(processor, "include_top", False):  # EfficientNet's divides by its std once more
        std = [value * value for value in std]
    if getattr(processor, "rescale_offset", False):
        raise EbjdatError("the image processor shifts pixels after it scales them (rescale_offset), which is not imported")
    return Normalisation(round(scale, 9), mean, std, "bgr" if getattr(processor, "do_flip_channel_order", False) else "rgb")


def spread(value: Any) -> list[Any]:
    """Return a mean or std of three channels, which may be told as one number."""
    return [value] * 3 if isinstance(value, int | float) else list(value)


def input_of(processor: Any) -> Input:
    """Return the input contract of an image processor; raise EbjdatError for one that resizes as no contract says."""
    size, crop = sides(getattr(processor, "size", None)), sides(getattr(processor, "crop_size", None))
    kind = FILTERS.get(int(getattr(processor, "resample", 2) or 0))
    cropped = getattr(processor, "do_center_crop", False) and crop
    if not getattr(processor, "do_resize", False) or not size or kind is None or getattr(processor, "do_pad", False):
        raise EbjdatError("the image processor does not resize to one size, or by a filter that no contract has")
    share = getattr(processor, "crop_pct", None)
    if share and "shortest_edge" in size:  # of ConvNeXt: below 384 resized and cropped, from there on squashed
        side = size["shortest_edge"]
        if side >= 384:
            return Input(side, side, "squash", kind)  # type: ignore[arg-type]
        return Input(side, side, "shorter", kind, crop_of(side, side, (int(side / share),) * 2), "floor")  # type: ignore[arg-type]
    if "height" in size:
        frame, resize = (size["height"], size["width"]), "squash"
    elif set(size) == {"shortest_edge"}:
        frame, resize = (size["shortest_edge"],) * 2, "shorter"
    else:
        raise EbjdatError(f"the image processor resizes by {', '.join(sorted(size))}, which no contract says")
    if resize == "shorter" and not cropped:
        raise EbjdatError("the image processor crops nothing, so that images are of many sizes: set do_center_crop and crop_size")
    high, wide = (crop["height"], crop["width"]) if cropped else frame
    return Input(high, wide, resize, kind, crop_of(high, wide, frame), "floor")  # type: ignore[arg-type]


def sides(size: Any) -> dict[str, int]:
    """Return a size of a processor as its named sides, those that are said."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    named = size if isinstance(size, Mapping) else vars(size) if size is not None else {}
    return {str(name): int(value) for name, value in named.items() if value is not None}


def card_licence(folder: Path) -> str:
    """Return the licence that the model card's front matter says, "" if none."""
    file = folder / "README.md"
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        head = stream.read(LARGEST_CARD).decode("utf-8", "replace")
    told = re.match(r"---\s*\n(.*?)\n---", head, re.S)
    line = re.search(r"^license:\s*([\w.+-]{1,60})\s*$", told[1], re.M) if told else None
    return line[1] if line else ""


def reference(processor: Any, module: nn.Module) -> Callable[[bytes], NDArray[np.float32]]:
    """Return the folder's own pipeline from an encoded image to logits (K,)."""

    def run(encoded: bytes) -> NDArray[np.float32]:
        with Image.open(io.BytesIO(encoded)) as image, torch.no_grad():
            taken = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
            logits: NDArray[np.float32] = module(taken).logits[0].float().numpy()
        return logits

    return run
