"""ONNX Runtime on the bundle's two graphs: CUDA where it runs, else the CPU; no torch."""

from functools import cached_property

import numpy as np
import onnxruntime as ort

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, Floats, Labels
from ebjdat_serve.errors import EngineError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class OnnxEngine:
    """Sessions are opened when first used: a server that only classifies never loads the score graph."""

    name = "onnx"

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 1) -> None:
        self._folder = bundle.path
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        # spinning threads starve the HTTP process of the same machine
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._options.log_severity_level = 3
        available = ort.get_available_providers()
        if device == "cuda" and CUDA not in available:
            raise EngineError("the CUDA provider is not in this ONNX Runtime: pip install 'ebjdat-serve[gpu]', or use --device cpu")
        if device != "cpu" and CUDA in available and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self._providers = [CUDA, CPU] if device != "cpu" and CUDA in available else [CPU]
        self.provider = self._classify.get_providers()[0]
        if device == "cuda" and self.provider != CUDA:
            raise EngineError(
                f"CUDA was asked for but ONNX Runtime runs on {self.provider}: check the driver and the CUDA libraries, or use --device cpu"
            )

    @cached_property
    def _classify(self) -> ort.InferenceSession:
        return ort.InferenceSession(self._folder / "classify.onnx", self._options, providers=self._providers)

    @cached_property
    def _score(self) -> ort.InferenceSession:
        return ort.InferenceSession(self._folder / "score.onnx", self._options, providers=self._providers)

    def classify(self, image: Floats) -> tuple[Floats, Floats]:
        """Return logits (N, K) and energy E(x) (N,), nats."""
        logits, energy = self._classify.run(["logits", "energy"], {"image": image})
        return logits, energy

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""
        score, energy = self._score.run(["score", "energy"], {"image": image, "label": label.astype(np.int64, copy=False)})
        return score, energy
