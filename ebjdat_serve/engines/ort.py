"""The ONNX Runtime engine: runs the bundle's graphs on TensorRT, CUDA or the CPU, without torch."""

import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from ebjdat_serve.bundle import MANIFEST, Bundle
from ebjdat_serve.engines import Device, Floats, Labels, Outputs, Precision, output_names
from ebjdat_serve.engines.providers import BATCHES, CPU, GPU, TENSORRT, chosen, options_for
from ebjdat_serve.errors import BundleError, EngineError
from ebjdat_serve.listing import printable
from ebjdat_serve.sgld import Chains

FAILURES = (errors.Fail, errors.EPFail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented, errors.RuntimeException)
"""Exceptions that ONNX Runtime raises when a session cannot be opened."""


class OnnxEngine:
    """The Engine protocol on ONNX Runtime. Sessions are opened on first use: a server that only classifies never loads the other graphs."""

    name = "onnx"

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 1, precision: Precision = "fp32") -> None:
        self.precision: Precision = precision
        self._bundle, self._threads, self._wish = bundle, threads, chosen(device, precision)
        self._strict = device != "auto"
        self._outputs = output_names(bundle.manifest)
        self.provider = self._classify.get_providers()[0]

    @cached_property
    def _classify(self) -> ort.InferenceSession:
        return self._open("classify")

    @cached_property
    def _score(self) -> ort.InferenceSession:
        return self._open("score")

    @cached_property
    def _step(self) -> ort.InferenceSession:
        return self._open("step")

    def warm(self, function: str) -> str:
        """Open the session of ``function`` (classify, score, step) and return the provider that runs it."""
        session: ort.InferenceSession = getattr(self, f"_{function}")
        return str(session.get_providers()[0])

    def _open(self, function: str) -> ort.InferenceSession:
        graph = self._bundle.graph(function, self.precision)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # spinning threads starve the HTTP process on the same machine
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.log_severity_level = 3
        if self._wish == CPU and ".fp16." in graph.name:
            # a CPU computes fp16 by casts, only to measure errors: the optimiser would cancel them, and nothing would be rounded
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with options_for(self._wish, self._bundle, graph) as wanted:
            try:
                # disable the fallback, which would continue with other providers and options
                session = ort.InferenceSession(utf8(graph), options, providers=wanted, enable_fallback=0)
            except FAILURES as error:
                raise EngineError(f"ONNX Runtime cannot open {graph} on {self._wish}: {error}") from error
            self._check(session, function, graph)
        return session

    def _check(self, session: ort.InferenceSession, function: str, graph: Path) -> None:
        about, weights = session.get_modelmeta().custom_metadata_map, self._bundle.manifest.files["weights.safetensors"].sha256
        if about.get("weights") != weights:
            raise BundleError(
                f"{self._bundle.path}: a graph was exported from other weights; python export/to_onnx.py BUNDLE exports it again"
            )
        if function == "classify" and (lacking := set(self._outputs) - {one.name for one in session.get_outputs()}):
            lack = ", ".join(sorted(lacking))
            raise BundleError(f"{graph} has no output {lack}, as {MANIFEST} says by its output and capabilities")
        placed = _operators(session)
        if self._strict and (session.get_providers()[0] != self._wish or not placed[self._wish]):
            raise EngineError(
                f"{self._wish} was requested but ONNX Runtime runs on {session.get_providers()[0]} ({dict(placed)} operators): check the "
                "driver and the provider's libraries (extras [gpu] and [tensorrt])",
                options=("--device cpu",),
            )

    def placement(self) -> dict[str, dict[str, int]]:
        """Return, for each open graph, the number of its operators per provider."""
        sessions = {name: self.__dict__[f"_{name}"] for name in ("classify", "score", "step") if f"_{name}" in self.__dict__}
        return {name: dict(_operators(session)) for name, session in sessions.items()}

    def classify(self, image: Floats) -> Outputs:
        """Return logits, energy and features."""
        found = self._classify.run(self._outputs, {"image": image})
        return Outputs.of(dict(zip(self._outputs, found, strict=True)))

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""
        score, energy = self._score.run(["score", "energy"], {"image": image, "label": label.astype(np.int64, copy=False)})
        return score, energy

    def advance(self, chains: Chains, steps: int) -> Chains:
        """Return ``chains`` after ``steps`` Langevin steps: one run of the step graph each, alternating between two buffers."""
        if self._wish == TENSORRT and len(chains.label) > BATCHES[-1]:  # beyond the optimisation profile
            parts = [chains.rows(slice(i, i + BATCHES[-1])) for i in range(0, len(chains.label), BATCHES[-1])]
            return Chains.join([self.advance(part, steps) for part in parts])
        device = "cuda" if self.provider in GPU else "cpu"
        arrays = chains.arrays()
        if device == "cpu" and steps == 1:  # nothing to copy, and 5 % faster for one chain
            return chains.moved(self._step.run(["next_image"], arrays)[0], 1)
        place = {name: ort.OrtValue.ortvalue_from_numpy(array.copy(), device) for name, array in arrays.items()}
        other = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(arrays[name].shape, arrays[name].dtype, device) for name in ("image", "step")
        }
        energy = ort.OrtValue.ortvalue_from_shape_and_type([len(chains.label)], np.float32, device)
        bindings = [self._bind(place, other, energy), self._bind({**place, **other}, place, energy)]
        options = ort.RunOptions()
        # the host enqueues the steps and waits once
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for step in range(steps):
            self._step.run_with_iobinding(bindings[step % 2], options)
        bindings[0].synchronize_outputs()
        # on a CPU numpy() is a view of memory that the OrtValue frees
        return chains.moved((other if steps % 2 else place)["image"].numpy().copy(), steps)

    def _bind(self, source: dict[str, Any], target: dict[str, Any], energy: Any) -> Any:
        binding = self._step.io_binding()
        for name, value in source.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("image", "step"):
            binding.bind_ortvalue_output(f"next_{name}", target[name])
        binding.bind_ortvalue_output("energy", energy)
        return binding


def utf8(path: Path) -> str:
    """Return a path in UTF-8, as ONNX Runtime needs it in every locale; raise EngineError for one that is not UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EngineError(f"{printable(path)}: ONNX Runtime opens only paths in UTF-8; rename the folder") from error


def _operators(session: ort.InferenceSession) -> Counter[str]:
    count: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        count[part.ep_name] += len(part.get_nodes())
    return count
