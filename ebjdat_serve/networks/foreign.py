"""Families of other people's networks: built when their package is there, never guessed from weights."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from ebjdat_serve.errors import OF_NETWORKS, EngineError, first_line
from ebjdat_serve.install import pip
from ebjdat_serve.networks.network import Architecture, Network
from ebjdat_serve.networks.normalisation import Normalisation
from ebjdat_serve.networks.wrapped import Wrapped

TIMM_NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100})?")
CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
LOCAL = ("transformers_version", "id2label", "label2id", "num_labels", "torch_dtype", "dtype", "attn_implementation")
"""Keys of a Hugging Face config that a bundle leaves out: of what saved it, or what the bundle says itself; and all that begin with _.
``architectures`` stays: a model type may have several classifiers (deit)."""
HUGGING_FACE = frozenset((
    "beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "efficientnet",
    "focalnet", "hgnet_v2", "ijepa", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pvt", "pvt_v2", "regnet", "resnet",
    "siglip", "siglip2", "swiftformer", "swin", "swinv2", "vit", "vit_msn",
))  # fmt: skip
"""Model types of transformers that are built: those whose code is their own. One that wraps another library (timm_wrapper) would have it
load what a config names, by pickle or from the network."""
DELEGATED = ("auto_map", "model_args", "backbone", "backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone",
             "transformers_weights", "quantization_config", "custom_pipelines")  # fmt: skip
"""Keys, at any depth, of a config that has something else than its own layers built or read."""


@dataclass(frozen=True)
class Foreign(Architecture):
    """What the families have in common: the normalisation, and the name of the last linear layer, "" where there is none."""

    normalisation: Normalisation = field(default_factory=Normalisation, kw_only=True)
    head: str = field(default="", kw_only=True)

    @abstractmethod
    def module(self, classes: int) -> nn.Module:
        """Return the module itself, its weights random; raise EngineError where it cannot be built here."""

    def build(self, classes: int) -> Network:
        return Wrapped(self.module(classes), classes, self.normalisation, self.head)

    def described(self) -> dict[str, Any]:
        return {"family": self.family, **asdict(self)}


@dataclass(frozen=True)
class TimmArchitecture(Foreign):
    """A model of timm (PyTorch Image Models) by its name there."""

    family = "timm"

    model: str

    def __post_init__(self) -> None:
        if not TIMM_NAME.fullmatch(self.model):
            raise ValueError(f"{self.model[:40]!r} is no name of a model of timm")

    def module(self, classes: int) -> nn.Module:
        timm = package("timm", self.family)
        return built(self.family, lambda: timm.create_model(self.model, pretrained=False, num_classes=classes))


@dataclass(frozen=True)
class HuggingFaceArchitecture(Foreign):
    """An image classifier of transformers by its config; one whose code lies beside the weights is refused."""

    family = "huggingface"

    config: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("its config must name model_type")
        if fault := config_fault(self.config):
            raise ValueError(f"its config {fault}")

    def module(self, classes: int) -> nn.Module:
        transformers = package("transformers", self.family)

        def make() -> nn.Module:
            told = huggingface_config(self.config)
            config = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
            config.num_labels = classes
            # eager: plain matrix products and a softmax, which trace and export
            made: nn.Module = transformers.AutoModelForImageClassification.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
            return made

        return built(self.family, make)


@dataclass(frozen=True)
class PythonArchitecture(Foreign):
    """A callable of somebody's Python code, ``package.module:name``, which returns a module: run by ``import --allow-code`` alone."""

    family = "python"

    callable: str

    def __post_init__(self) -> None:
        if not CALLABLE.fullmatch(self.callable):
            raise ValueError(f"{self.callable[:80]!r} is not package.module:callable")

    def module(self, classes: int) -> nn.Module:
        raise EngineError(
            f"the network is Python code, {self.callable}, which was run when it was imported and never is to serve: "
            "its graphs are in the bundle",
            options=("--engine onnx",),
        )


@dataclass(frozen=True)
class OnnxArchitecture(Architecture):
    """A network that is known as an ONNX graph only."""

    family = "onnx"

    opset: int

    def build(self, classes: int) -> Network:
        raise EngineError("the network came as an ONNX graph: there is none for torch", options=("--engine onnx",))


def config_fault(config: Mapping[str, Any]) -> str:
    """Return why a Hugging Face config is not built from, "" if it is: nothing but layers of transformers' own may come of it."""
    if config.get("model_type") not in HUGGING_FACE:
        return f"is of {str(config.get('model_type'))[:40]!r}; built are {', '.join(sorted(HUGGING_FACE))}"

    def named(value: Any) -> str:
        if isinstance(value, Mapping):
            return next((str(key) for key in value if key in DELEGATED and value[key]), "") or named(list(value.values()))
        return next((found for part in value if (found := named(part))), "") if isinstance(value, list) else ""

    key = named(config)
    return f"has {key}: what it names, code or weights, is never run or read" if key else ""


def huggingface_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a Hugging Face config says which network it is."""
    return {name: value for name, value in config.items() if name not in LOCAL and not name.startswith("_")}


def package(name: str, family: str) -> Any:
    """Return an imported package; raise EngineError where it is missing or does not load."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        why = pip("install", name) if missing else f"it does not load here: {first_line(error)}"
        raise EngineError(f"a network of the family {family} needs the package {name}: {why}", options=("--engine onnx",)) from error


def built(family: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``make`` builds; raise EngineError, in one line, for whatever a library raises of sizes that it does not know."""
    try:
        return make()
    except OF_NETWORKS as error:
        raise EngineError(
            f"a network of the family {family} cannot be built: {type(error).__name__}: {first_line(error)}", options=("--engine onnx",)
        ) from error
