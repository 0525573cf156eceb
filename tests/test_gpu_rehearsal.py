"""The engines' GPU branches walked on the CPU: ONNX Runtime behind stand-ins that list CUDA and TensorRT and note what they are given."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import providers
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import EngineError
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.selftest import verify
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.compute.workers import ClassifyWorker, GenerateWorker, prepare, runs
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Chains, Sampler
from tests.conftest import DIGITS

SAMPLER = Sampler(1, 0.25, 2.0, 0.005)
PARTITIONED = (
    "TensorRT EP failed to create engine: the main graph could be partitioned. "
    "Following input(s) has no associated shape profiles provided: /noise/Mod_2_output_0"
)
"""What ONNX Runtime 1.31 says, shortened (onnxruntime#17007); /noise/Mod is the int64 operator that TensorRT may not take."""


class StandIn:
    """A session on the CPU that says it runs on the first provider that it was given, and notes options, and the shapes of its images."""

    opened: list["StandIn"] = []  # noqa: RUF012 (each test has its own list)
    partitions = False
    """Whether TensorRT rejects an operator in the middle of the graph."""
    real = ort.InferenceSession

    def __init__(self, graph, options=None, *, providers, enable_fallback=1):
        self.graph, self.shapes = Path(graph).name, []
        self.name, self.options = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
        if enable_fallback:  # the engine reads the inputs' names of the graph
            self.session = StandIn.real(graph, options, providers=["CPUExecutionProvider"])
            return
        StandIn.opened.append(self)
        cache = Path(self.options.get("trt_engine_cache_path", "."))
        if self.partitions and any(name.startswith("trt_profile_") for name in self.options):
            (cache / "half.engine").write_bytes(b"of the first part")
            raise errors.EPFail(PARTITIONED)
        self.session = StandIn.real(graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        if self.name == providers_module.TENSORRT and not self.partitions:
            (cache / "whole.engine").write_bytes(b"an engine")

    def run(self, names, feeds):
        if self.name == providers_module.TENSORRT and self.partitions:  # its ranges grow, and each growth builds
            (Path(self.options["trt_engine_cache_path"]) / f"{self.graph}.engine").write_bytes(b"parts")
        self.shapes.append(len(feeds["image"]))
        return self.session.run(names, feeds)

    def run_with_iobinding(self, binding, options):
        self.shapes.append(binding.get_outputs()[0].shape()[0])
        self.session.run_with_iobinding(binding, options)

    def get_providers(self):
        return [self.name, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        return [SimpleNamespace(ep_name=self.name, get_nodes=lambda: [1, 2])]

    def __getattr__(self, name):
        return getattr(self.session, name)


providers_module = providers


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An ONNX Runtime that lists CUDA and TensorRT, with TensorRT's libraries; memory of the GPU is the CPU's."""
    real = ort.OrtValue
    on_cpu = SimpleNamespace(
        ortvalue_from_numpy=lambda array, device: real.ortvalue_from_numpy(array, "cpu"),
        ortvalue_from_shape_and_type=lambda shape, kind, device: real.ortvalue_from_shape_and_type(shape, kind, "cpu"),
    )
    monkeypatch.setattr(ort, "OrtValue", on_cpu)
    monkeypatch.setattr(ort, "InferenceSession", StandIn)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.TENSORRT, providers.CUDA, providers.CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(StandIn, "opened", [])
    monkeypatch.setattr(providers, "load_tensorrt", lambda: None)
    monkeypatch.setattr(providers, "tensorrt_version", lambda: "10.16.1.11")
    monkeypatch.setattr(providers, "gpu_name", lambda: "NVIDIA H200, 9.0, 580.65")
    monkeypatch.setenv("EBJDAT_CACHE", str(tmp_path))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    return StandIn.opened


@pytest.fixture
def images(test_images):
    return (test_images[0][::5].transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)


# CUDA: buckets -----------------------------------------------------------------------------------------------------------


def test_a_session_of_cuda_sees_one_batch_size_however_many_a_server_sends(shipped, gpu, images):
    """ONNX Runtime plans each convolution anew when the batch size changes: 50 to 200 ms (onnxruntime#23006)."""
    engine, cpu = OnnxEngine(shipped, "cuda"), OnnxEngine(shipped, "cpu")
    sizes = [1, 3, 2, 32, 7, 31, 5, 1, 17]
    for n in sizes:
        for found, expected in zip(engine.classify(images[:n]), cpu.classify(images[:n]), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    sessions = [one for one in gpu if one.name == providers.CUDA]
    assert [set(one.shapes) for one in sessions] == [{1}, {4}, {64}, {16}]
    assert len({n for one in sessions for n in one.shapes}) < len(set(sizes)) / 2 + 1
    assert {one.options["cudnn_conv_algo_search"] for one in sessions} == {"HEURISTIC"}


def test_the_evaluations_chunks_are_of_one_size(shipped, gpu, images):
    """100 images are 64 and 36: two sizes, which alternate from chunk to chunk."""
    classify_in_chunks(OnnxEngine(shipped, "cuda"), images)
    assert [one.shapes for one in gpu if one.shapes] == [[64, 64]]


def test_more_images_than_the_largest_bucket_are_parts(shipped, gpu, monkeypatch, images):
    monkeypatch.setattr(providers, "BUCKETS", (1, 4))
    monkeypatch.setattr("ebjdat_serve.engines.ort.BUCKETS", (1, 4))
    engine, cpu = OnnxEngine(shipped, "cuda"), OnnxEngine(shipped, "cpu")
    label = np.arange(10) % 10
    for found, expected in zip(engine.score(images[:10], label), cpu.score(images[:10], label), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [one.shapes for one in gpu if one.name == providers.CUDA and one.shapes] == [[4, 4, 4]]


def test_chains_of_any_number_walk_in_buckets_as_on_the_cpu(shipped, gpu, images):
    engine, cpu = OnnxEngine(shipped, "cuda"), OnnxEngine(shipped, "cpu")
    for n in (1, 3, 2, 4):
        chains = Chains.at(images[:n], SAMPLER, np.arange(n), seed=4)
        found, expected = engine.advance(chains, 2), cpu.advance(chains, 2)
        np.testing.assert_allclose(found.image, expected.image, atol=1e-5)
        assert found.step.tolist() == [2] * n
    assert [set(one.shapes) for one in gpu if one.graph == "step.onnx" and one.name == providers.CUDA] == [{1}, {4}]


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_of_no_image_there_are_no_rows(shipped, gpu, images, device):
    engine, none = OnnxEngine(shipped, device), Chains.at(images[:1], SAMPLER, np.arange(1), seed=4).rows(slice(0))
    given = engine.classify(none.image)
    assert [values.shape for values in given] == [(0, *values.shape[1:]) for values in engine.classify(images[:1])]
    assert [values.shape for values in engine.score(none.image, none.label)] == [(0, 3, 32, 32), (0,)]
    assert engine.advance(none, 3).image.shape == (0, 3, 32, 32)


# before the first request ------------------------------------------------------------------------------------------------


def warmed(kind, device):
    """Return a model as a worker opens it, warmed."""
    worker = kind("model", Settings(DIGITS), ())
    worker.rate, worker.channel = 0.0, SimpleNamespace(send=lambda message: None)
    model = Model(DIGITS, Settings(DIGITS, device=device, engine="onnx"), kind.functions)
    worker.warm_up(model)
    return model


def test_no_request_opens_a_session(gpu):
    """Each of CUDA's sizes has a session of its own, which takes seconds to open and to plan; so does a refresh's."""
    model = warmed(ClassifyWorker, "cuda")
    before = len(gpu)
    for n in (1, 2, 5, 17, 33, 64, 70):
        model.predict(np.zeros((n, 8, 8, 3), np.uint8))
    assert len(gpu) == before


def test_no_turn_of_chains_opens_a_session(gpu):
    model = warmed(GenerateWorker, "cuda")
    before = len(gpu)
    for n in (1, 2, 5, 17, 65, 256):
        for run in runs(model, n):
            run()
    assert len(gpu) == before
    assert {one.graph for one in gpu} == {"classify.onnx", "score.onnx", "step.onnx"}


@pytest.mark.parametrize(("kind", "seen"), [(ClassifyWorker, [1]), (GenerateWorker, [1, 8, 8, 8])])
def test_a_cpu_is_warmed_as_before(monkeypatch, kind, seen):
    model, sizes = Model(DIGITS, Settings(DIGITS, device="cpu", engine="onnx"), kind.functions), []
    for name in ("classify", "score", "advance"):
        honest = getattr(model.engine, name)
        monkeypatch.setattr(model.engine, name, lambda rows, *more, honest=honest: sizes.append(len(rows)) or honest(rows, *more))
    worker = kind("model", Settings(DIGITS), ())
    worker.rate, worker.channel = 0.0, SimpleNamespace(send=lambda message: None)
    worker.warm_up(model)
    assert sizes == seen


def test_a_large_batch_that_cannot_be_prepared_is_a_warning_and_the_smallest_an_error(caplog):
    def run(n, most):
        if n > most:
            raise MemoryError("CUDA out of memory")
        done.append(n)

    done = []
    prepare([1, 4, 16, 64], lambda n: run(n, 4))
    assert done == [1, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "no batch of 16 is prepared, and requests that bring one may fail: MemoryError: CUDA out of memory"
    ]
    with pytest.raises(MemoryError):
        prepare([1, 4], lambda n: run(n, 0))


# what is listed, and what loads ------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(gpu, monkeypatch):
    """A wheel with CUDA as a plugin, whose import found no libraries of CUDA: it lists CUDA once they are loaded."""
    loaded = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append(True))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*([providers.CUDA] if loaded else []), providers.CPU])
    monkeypatch.setattr(ort, "get_build_info", lambda: "ORT Build Info: build type=Release, cuda-plugin-ep=1")
    return loaded


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_cuda_as_a_plugin_is_registered_before_a_provider_is_chosen(plugin, device):
    assert providers.chosen(device, "fp32") == providers.CUDA
    assert plugin


def test_a_gpu_build_without_cuda_never_takes_the_cpu_in_silence(plugin, monkeypatch, caplog):
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider"):
        providers.chosen("cuda", "fp32")
    with caplog.at_level(logging.WARNING, "ebjdat_serve"):
        assert providers.chosen("auto", "fp32") == providers.CPU
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_build_for_cpus_takes_the_cpu_without_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CPU])
    with caplog.at_level(logging.WARNING, "ebjdat_serve"):
        assert providers.chosen("auto", "fp32") == providers.CPU
    assert not caplog.records


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_cuda_that_is_listed_and_does_not_load_is_told(shipped, gpu, monkeypatch, caplog, device):
    monkeypatch.setattr(StandIn, "get_providers", lambda self: [providers.CPU])
    monkeypatch.setattr(StandIn, "get_provider_graph_assignment_info", lambda self: [])
    if device == "cuda":
        with pytest.raises(EngineError, match="was requested but ONNX Runtime runs on CPU"):
            OnnxEngine(shipped, "cuda")
        return
    with caplog.at_level(logging.WARNING, "ebjdat_serve"):
        engine = OnnxEngine(shipped, "auto")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    engine.classify(np.zeros((3, 3, 32, 32), np.float32))
    assert gpu[-1].shapes == [3]  # no buckets on a CPU


# TensorRT ----------------------------------------------------------------------------------------------------------------


def sealed(tmp_path):
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "tensorrt").glob("*/engine.json"))]


def test_tensorrt_takes_a_whole_graph_by_its_profile_and_the_cache_serves_again(shipped, gpu, tmp_path):
    for _ in range(2):
        verify(shipped, OnnxEngine(shipped, "tensorrt"))
        assert all(one.options["trt_profile_opt_shapes"].startswith("image:32x3x32x32") for one in gpu)
        assert [seal["profile"] for seal in sealed(tmp_path)] == [True] * 3
    assert not any(one.options["trt_fp16_enable"] == "1" for one in gpu)


def test_a_graph_that_tensorrt_takes_in_parts_is_built_without_a_profile(gpu, monkeypatch, tmp_path, images):
    """One operator that TensorRT rejects, an int64 Mod say, leaves parts with inputs that the profile does not name."""
    monkeypatch.setattr(StandIn, "partitions", True)
    small, images = Bundle.load(DIGITS), images[..., ::4, ::4]  # it runs 256 images twice, which takes the shipped network long
    engine, cpu = OnnxEngine(small, "tensorrt"), OnnxEngine(small, "cpu")
    np.testing.assert_allclose(engine.classify(images[:5]).logits, cpu.classify(images[:5]).logits, atol=1e-5)
    first, second = gpu[:2]
    assert set(first.options) - set(second.options) == {f"trt_profile_{name}_shapes" for name in ("min", "opt", "max")}
    assert second.shapes == [1, 256, 5]  # the range is spanned before the engine is sealed: 5 builds nothing
    (seal,) = sealed(tmp_path)
    assert (seal["profile"], list(seal["files"])) == (False, ["classify.onnx.engine"])  # nothing of the first attempt

    del gpu[:]
    again = OnnxEngine(small, "tensorrt")
    assert [any("profile" in name for name in one.options) for one in gpu] == [False]  # it is not tried and built again at each start
    for function in ("score", "step"):
        again.warm(function)
    chains = Chains.at(images[:3], SAMPLER, np.arange(3), seed=4)
    np.testing.assert_allclose(again.advance(chains, 2).image, cpu.advance(chains, 2).image, atol=1e-5)
    assert len(sealed(tmp_path)) == 3


def test_fp16_is_of_the_graph_that_has_it(shipped, gpu, tmp_path):
    assert OnnxEngine(shipped, "tensorrt", precision="fp16").provider == providers.TENSORRT
    assert [(one.graph, one.options["trt_fp16_enable"]) for one in gpu] == [("classify.fp16.onnx", "1")]


def test_another_failure_of_tensorrt_is_no_reason_for_parts(shipped, gpu, monkeypatch):
    monkeypatch.setattr(StandIn, "partitions", True)
    monkeypatch.setattr(f"{__name__}.PARTITIONED", "TensorRT EP failed to create engine from network")
    with pytest.raises(EngineError, match="failed to create engine"):
        OnnxEngine(shipped, "tensorrt")
    assert len(gpu) == 1


def test_a_fallback_to_cuda_in_tensorrts_list_is_no_tensorrt(shipped, gpu, monkeypatch):
    monkeypatch.setattr(
        StandIn, "get_provider_graph_assignment_info", lambda self: [SimpleNamespace(ep_name=providers.CUDA, get_nodes=list)]
    )
    with pytest.raises(EngineError, match="TensorrtExecutionProvider was requested"):
        OnnxEngine(shipped, "tensorrt")


def test_placement_names_every_session(shipped, gpu, images):
    engine = OnnxEngine(shipped, "cuda")
    engine.advance(Chains.at(images[:2], SAMPLER, np.arange(2), seed=1), 1)
    assert engine.placement() == {"classify": {providers.CUDA: 2}, "step": {providers.CUDA: 2}}
