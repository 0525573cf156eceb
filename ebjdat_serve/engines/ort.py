"""The ONNX Runtime engine: runs the bundle's graphs on TensorRT, CUDA or the CPU, without torch."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from ebjdat_serve.bundle import MANIFEST, Bundle
from ebjdat_serve.engines import Device, Floats, Labels, Outputs, Precision, one_like, output_names
from ebjdat_serve.engines.providers import (
    BATCHES,
    BUCKETS,
    CPU,
    CUDA,
    GPU,
    TENSORRT,
    UNPROFILED,
    Wanted,
    bucket,
    chosen,
    has_profile,
    options_for,
    start_again,
)
from ebjdat_serve.errors import BundleError, EngineError
from ebjdat_serve.listing import printable
from ebjdat_serve.sgld import Chains, Sampler

FAILURES = (errors.Fail, errors.EPFail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented, errors.RuntimeException)
"""Exceptions that ONNX Runtime raises when a session cannot be opened."""
log = logging.getLogger("ebjdat_serve")


class OnnxEngine:
    """The Engine protocol on ONNX Runtime. Sessions are opened on first use: a server that only classifies never loads the other graphs."""

    name = "onnx"

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 1, precision: Precision = "fp32") -> None:
        self.precision: Precision = precision
        self._bundle, self._threads, self._wish = bundle, threads, chosen(device, precision)
        self._strict = device != "auto"
        self._outputs = output_names(bundle.manifest)
        self._sessions: dict[tuple[str, int], ort.InferenceSession] = {}
        self.provider = self.warm("classify")
        if self.provider != self._wish:  # of ``auto``, which takes what there is
            log.warning("%s is listed but does not load, so %s computes: check the driver and its libraries", self._wish, self.provider)
            self._wish, self._sessions = self.provider, {}

    def warm(self, function: str) -> str:
        """Open the session of ``function`` (classify, score, step) and return the provider that runs it."""
        return str(self._session(function, 1).get_providers()[0])

    def _session(self, function: str, n: int) -> ort.InferenceSession:
        """Return the session of ``function`` for a batch of ``n``: on CUDA each size has its own, whose convolutions are planned once."""
        key = (function, n if self._wish == CUDA else 0)
        if key not in self._sessions:
            self._sessions[key] = self._open(function)
        return self._sessions[key]

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
                session = _opened(graph, options, wanted)
            except FAILURES as error:
                raise EngineError(f"ONNX Runtime cannot open {graph} on {self._wish}: {error}") from error
            self._check(session, function, graph)
            if self._wish == TENSORRT and not has_profile(wanted):
                self._span(session)
        return session

    def _span(self, session: ort.InferenceSession) -> None:
        """Run the smallest and the largest batch, between which TensorRT's engines then serve all without being built again."""
        size = self._bundle.manifest.input
        for n in (BATCHES[0], BATCHES[-1]):
            image = np.zeros((n, 3, size.height, size.width), np.float32)
            feeds = Chains.at(image, Sampler(1, 0.0, 0.0, 0.0), np.zeros(n, np.int64), seed=0).arrays()
            session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()})

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
        return {name: dict(_operators(session)) for (name, _), session in self._sessions.items()}

    def sizes(self, most: int) -> list[int]:
        """Return the batch sizes that batches of 1 to ``most`` are computed in: on CUDA the buckets, each with a session of its own."""
        return [size for size in BUCKETS if size <= bucket(most)] if self._wish == CUDA else [1]

    def classify(self, image: Floats) -> Outputs:
        """Return logits, energy and features."""
        found = self._run("classify", self._outputs, {"image": image})
        return Outputs.of(dict(zip(self._outputs, found, strict=True)))

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""
        score, energy = self._run("score", ["score", "energy"], {"image": image, "label": label.astype(np.int64, copy=False)})
        return score, energy

    def _run(self, function: str, outputs: list[str], feeds: dict[str, Any]) -> list[Floats]:
        """Return a graph's outputs; on CUDA of batches padded to the next bucket."""
        n = len(feeds["image"])
        if not n:  # no provider of a GPU has a plan for it
            return [output[:0] for output in self._run(function, outputs, {name: one_like(array) for name, array in feeds.items()})]
        if self._wish != CUDA:
            return list(self._session(function, n).run(outputs, feeds))
        parts = []
        for start in range(0, n, BUCKETS[-1]):
            part = {name: array[start : start + BUCKETS[-1]] for name, array in feeds.items()}
            rows = len(part["image"])
            padded = {name: array[_padding(rows)] for name, array in part.items()}
            found = self._session(function, bucket(rows)).run(outputs, padded)
            parts.append([output[:rows] for output in found])
        return parts[0] if len(parts) == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]

    def advance(self, chains: Chains, steps: int) -> Chains:
        """Return ``chains`` after ``steps`` Langevin steps: one run of the step graph each, alternating between two buffers."""
        n = len(chains.label)
        if not n:
            return chains.moved(chains.image, steps)
        if self._wish in GPU and n > BATCHES[-1]:  # beyond the optimisation profile, and the largest bucket
            parts = [chains.rows(slice(i, i + BATCHES[-1])) for i in range(0, n, BATCHES[-1])]
            return Chains.join([self.advance(part, steps) for part in parts])
        if self._wish == CUDA and bucket(n) != n:
            return self.advance(chains.rows(_padding(n)), steps).rows(slice(n))
        session = self._session("step", n)
        device = "cuda" if self.provider in GPU else "cpu"
        arrays = chains.arrays()
        if device == "cpu" and steps == 1:  # nothing to copy, and 5 % faster for one chain
            return chains.moved(session.run(["next_image"], arrays)[0], 1)
        place = {name: ort.OrtValue.ortvalue_from_numpy(array.copy(), device) for name, array in arrays.items()}
        other = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(arrays[name].shape, arrays[name].dtype, device) for name in ("image", "step")
        }
        energy = ort.OrtValue.ortvalue_from_shape_and_type([len(chains.label)], np.float32, device)
        bindings = [_bound(session, place, other, energy), _bound(session, {**place, **other}, place, energy)]
        options = ort.RunOptions()
        # the host enqueues the steps and waits once
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for step in range(steps):
            session.run_with_iobinding(bindings[step % 2], options)
        bindings[0].synchronize_outputs()
        # on a CPU numpy() is a view of memory that the OrtValue frees
        return chains.moved((other if steps % 2 else place)["image"].numpy().copy(), steps)


def _bound(session: ort.InferenceSession, source: dict[str, Any], target: dict[str, Any], energy: Any) -> Any:
    binding = session.io_binding()
    for name, value in source.items():
        binding.bind_ortvalue_input(name, value)
    for name in ("image", "step"):
        binding.bind_ortvalue_output(f"next_{name}", target[name])
    binding.bind_ortvalue_output("energy", energy)
    return binding


def _padding(n: int) -> list[int]:
    """Return the rows of a bucket of ``n``: each once, and the first again in what is left."""
    return [*range(n), *[0] * (bucket(n) - n)]


def _opened(graph: Path, options: ort.SessionOptions, wanted: Wanted) -> ort.InferenceSession:
    """Return the session of a graph; without TensorRT's profile where TensorRT cannot take the whole graph, of which the profile is."""
    try:
        # disable the fallback, which would continue with other providers and options
        return ort.InferenceSession(utf8(graph), options, providers=wanted, enable_fallback=0)
    except FAILURES as error:
        if UNPROFILED not in str(error) or not has_profile(wanted):
            raise
        log.warning("TensorRT takes parts of %s alone: built without an optimisation profile", graph)
        start_again(wanted)
        return ort.InferenceSession(utf8(graph), options, providers=wanted, enable_fallback=0)


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
