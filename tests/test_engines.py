"""Tests of engines: equal chains on every engine, the provider in use, and the cache of TensorRT engines."""

import json
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from queue import Queue
from threading import Thread
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.engines import operations
from ebjdat_serve.bundle import GRAPHS, Bundle
from ebjdat_serve.energy import score
from ebjdat_serve.engines import eager, load_engine, providers
from ebjdat_serve.engines.eager import TorchEngine, load_model
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError, EngineError
from ebjdat_serve.networks import wideresnet
from ebjdat_serve.noise import horner, normal, uniform
from ebjdat_serve.selftest import PROBE, verify
from ebjdat_serve.sgld import PRIME, Chains, Prior, Sampler
from tests.conftest import until


def keys(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, PRIME, (n, 4, 4)))


@pytest.fixture(scope="module")
def roads(shipped):
    return {"onnx": OnnxEngine(shipped, "cpu"), "torch": TorchEngine(shipped, "cpu")}


@pytest.fixture(scope="module")
def chains(shipped):
    prior = Prior.load(shipped.path / "prior.safetensors")
    return Chains.start(prior, shipped.manifest.sampler, np.array([3, 0, -1, 9, 5]), seed=11)


# noise -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, PRIME - 1), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_the_polynomial_is_the_one_of_whole_numbers(coefficients, at):
    found = horner(torch.tensor(coefficients), torch.tensor(at))
    assert int(found) == sum(c * at**power for power, c in enumerate(coefficients)) % PRIME


def test_noise_is_standard_normal_and_fresh_at_every_step():
    z = torch.stack([normal(keys(200), torch.full((200,), step), (3, 8, 8)) for step in range(5)])
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    flat = z.reshape(5, -1)
    correlation = torch.corrcoef(flat) - torch.eye(5)
    assert float(correlation.abs().max()) < 5 / flat.shape[1] ** 0.5
    neighbours = (z[..., 1:] * z[..., :-1]).mean()
    assert abs(float(neighbours)) < 5 / n**0.5


def test_noise_is_finite_at_the_ends_of_the_field():
    ends = torch.stack([torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), PRIME - 1)])
    for step in (0, 1, 10**6):
        assert torch.isfinite(normal(ends, torch.tensor([step, step]), (3, 4, 4))).all()


def test_a_chains_noise_is_its_own():
    key = keys(3)
    together = uniform(key, torch.tensor([4, 5, 6]), 12)
    torch.testing.assert_close(together[1:2], uniform(key[1:2], torch.tensor([5]), 12), rtol=0, atol=0)


# chains ------------------------------------------------------------------------------------------------------------------


def test_all_roads_walk_the_same_chain(roads, chains):
    onnx_end, torch_end = (roads[name].advance(chains, 10) for name in ("onnx", "torch"))
    assert onnx_end.step.tolist() == [10] * 5
    np.testing.assert_allclose(onnx_end.image, torch_end.image, atol=1e-4)
    assert np.abs(onnx_end.image - chains.image).max() > 0.1


@pytest.mark.parametrize("road", ["onnx", "torch"])
def test_steps_taken_at_once_or_in_pieces_are_the_same_bytes(roads, chains, road):
    whole = roads[road].advance(chains, 5)
    pieces = roads[road].advance(roads[road].advance(chains, 2), 3)
    np.testing.assert_array_equal(whole.image, pieces.image)
    assert roads[road].advance(chains, 0).image.tobytes() == chains.image.tobytes()


@pytest.mark.parametrize("road", ["onnx", "torch"])
def test_a_chain_does_not_depend_on_its_company_and_leaves_at_any_step(roads, chains, road):
    engine = roads[road]
    halfway = engine.advance(chains, 3)
    alone = engine.advance(chains.rows([3]), 6)
    np.testing.assert_allclose(engine.advance(halfway.rows([3, 1]), 3).image[0], alone.image[0], atol=2e-5)


@pytest.mark.parametrize("road", ["onnx", "torch"])
def test_every_chain_has_its_own_sampler(roads, chains, road):
    still = np.array([0, 1, 0, 1, 0], np.float32)
    zero = np.zeros(5, np.float32)
    moved = roads[road].advance(replace(chains, step_size=still * 0.25, noise_std=zero), 2).image
    changed = np.abs(moved - chains.image).max(axis=(1, 2, 3)) > 0
    np.testing.assert_array_equal(changed, still > 0)


def test_the_step_is_the_samplers_own(roads, shipped):
    image = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    label = np.array([1, -1])
    chains = Chains.at(image, Sampler(1, 0.25, 0.02, 0.1), label, seed=5)
    score, _ = roads["onnx"].score(image, label)
    noise = normal(torch.from_numpy(chains.key), torch.tensor([0, 0]), (3, 32, 32)).numpy()
    expected = (image + 0.25 * score.clip(-0.02, 0.02) + 0.1 * noise).clip(0, 1)
    np.testing.assert_allclose(roads["onnx"].advance(chains, 1).image, expected, atol=1e-5)


def test_advancing_leaves_the_callers_arrays_alone(roads, chains):
    before = {name: array.copy() for name, array in chains.arrays().items()}
    for engine in roads.values():
        engine.advance(chains, 3)
    for name, array in chains.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_bf16_keeps_the_chains_state_in_fp32(shipped, chains):
    engine = TorchEngine(shipped, "cpu", 1, "bf16")
    small = replace(chains, step_size=np.full(5, 1e-5, np.float32), noise_std=np.zeros(5, np.float32))
    end = engine.advance(small, 1).image
    assert end.dtype == np.float32
    assert 0 < np.abs(end - small.image).max() < 1e-4  # such a step is lost in bf16, whose neighbours are 4e-3 apart


@pytest.fixture
def captures(monkeypatch):
    """What a GPU does, but for the recording itself: torch.cuda's part is played here, and a replay calls what was recorded.

    Each capture notes its options, whether the device was free for another thread, and its function.
    """
    seen = []

    class Stream:
        def wait_stream(self, other):
            """Nothing to wait for."""

    @contextmanager
    def graph(made, **how):
        free = Queue()
        Thread(target=lambda: free.put(eager.DEVICE_LOCK.acquire(blocking=False))).start()  # re-entrant, so another thread asks
        seen.append((how, free.get(timeout=10)))
        yield

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": nullcontext, "graph": graph, "graph_pool_handle": object}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    honest = eager.captured

    def captured(function, pool):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=function))
        return honest(function, pool)

    monkeypatch.setattr(eager, "captured", captured)
    return seen


@pytest.fixture
def gpu(monkeypatch, captures):
    """Return an engine that takes the GPU's road; its memory is the CPU's."""

    def engine(bundle, precision="fp32"):
        made = TorchEngine(bundle, "cpu", 1, precision)
        made._device = torch.device("meta")  # not the CPU's road; memory stays where Walk and Look are told
        made._model, made._features = made._fast, load_model(bundle).folded_features(eager.DTYPES[precision])
        made.score = lambda *given: tuple(found.numpy() for found in score(made._model, *map(torch.from_numpy, given)))
        return made

    for name in ("Walk", "Look"):
        kind = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda answer, rows, device, kind=kind: kind(answer, rows, torch.device("cpu")))
    return engine


def test_a_captured_walk_pads_to_a_power_of_two_and_serves_again(roads, shipped, chains, gpu, captures, monkeypatch):
    """Fixed memory for the next power of two, at most so many at once, used again."""
    monkeypatch.setattr(eager, "LARGEST", 4)
    expected, engine = roads["torch"].advance(chains, 3).image, gpu(shipped)
    for _ in range(2):
        found = engine.advance(chains, 3)
        np.testing.assert_allclose(found.image, expected, atol=2e-5)
        assert found.step.tolist() == [3] * 5
    np.testing.assert_allclose(engine.advance(chains.rows([4, 2, 0]), 3).image, expected[[4, 2, 0]], atol=2e-5)
    assert [shape[0] for shape in engine._walks] == [4, 1]
    assert len(captures) == 2


def test_a_captured_classification_pads_too_and_shares_the_memory_of_the_steps(roads, shipped, chains, gpu, captures, monkeypatch):
    monkeypatch.setattr(eager, "LARGEST", 4)
    engine, expected = gpu(shipped), roads["torch"].classify(chains.image)
    for rows in (slice(0, 5), slice(0, 3), slice(3, 4)):
        for found, whole in zip(engine.classify(chains.image[rows]), expected, strict=True):
            np.testing.assert_allclose(found, whole[rows], atol=2e-5)
    assert [shape[0] for shape in engine._looks] == [4, 1]
    engine.advance(chains, 1)
    assert len(captures) == 4
    assert len({id(how["pool"]) for how, _ in captures}) == 1


def test_on_a_gpu_fp32_with_folded_norms_passes_the_self_test(shipped, gpu):
    """The fewer calls are the same function: within the tolerances that every engine has."""
    verify(shipped, gpu(shipped))


def test_a_capture_leaves_other_threads_alone_and_the_device_to_itself(shipped, chains, gpu, captures):
    """A refresh captures in a thread while the main thread answers."""
    engine = gpu(shipped)
    engine.advance(chains, 1)
    engine.classify(chains.image)
    assert [(how["capture_error_mode"], free) for how, free in captures] == [("thread_local", False)] * 2


def test_a_network_that_does_not_record_is_launched_call_by_call(roads, shipped, chains, gpu, monkeypatch, caplog):
    @contextmanager
    def graph(made, **how):
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    engine = gpu(shipped)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    np.testing.assert_allclose(engine.classify(chains.image).logits, roads["torch"].classify(chains.image).logits, atol=2e-5)
    np.testing.assert_allclose(engine.advance(chains, 2).image, roads["torch"].advance(chains, 2).image, atol=2e-5)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


@contextmanager
def no_memory(*_, **__):
    yield
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@contextmanager
def no_memory_and_no_end(*_, **__):
    """The end of a recording that has failed fails, too."""
    with suppress(torch.OutOfMemoryError):
        yield
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904 (torch names no cause)


@pytest.mark.parametrize(("where", "what"), [("stream", no_memory), ("graph", no_memory), ("graph", no_memory_and_no_end)])
def test_a_graph_that_does_not_fit_is_given_back_and_launched_call_by_call(roads, shipped, chains, gpu, monkeypatch, caplog, where, what):
    """Warm-up, recording, or its end: nothing of it says that the network does not record, and nothing ends the call."""
    given_back = []
    engine = gpu(shipped)
    monkeypatch.setattr(torch.cuda, where, what)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    for _ in range(2):
        np.testing.assert_allclose(engine.classify(chains.image).logits, roads["torch"].classify(chains.image).logits, atol=2e-5)
        np.testing.assert_allclose(engine.advance(chains, 2).image, roads["torch"].advance(chains, 2).image, atol=2e-5)
    assert len(given_back) == 2  # tried once for each
    assert ["does not fit into the GPU's memory" in record.getMessage() for record in caplog.records] == [True] * 2


def test_what_fails_before_it_is_recorded_is_an_error(shipped, chains, gpu, monkeypatch):
    @contextmanager
    def stream(_):
        yield
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    engine = gpu(shipped)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with pytest.raises(RuntimeError, match="mat1"):
        engine.classify(chains.image)


def test_every_size_of_a_gpu_is_captured_by_one_batch_of_each(shipped, gpu, captures):
    engine, image = gpu(shipped), np.zeros((11, 3, 32, 32), np.float32)
    assert engine.sizes(11) == [1, 2, 4, 8, 16]
    assert engine.sizes(64)[-1] == 64 and engine.sizes(10_000)[-1] == eager.LARGEST
    for n in engine.sizes(8):
        engine.classify(image[:n])
    before = len(captures)
    for n in range(1, 9):
        engine.classify(image[:n])
    assert len(captures) == before == 4


def test_norms_are_folded_into_one_copy(shipped, monkeypatch):
    folds, honest = [], wideresnet.Folded
    monkeypatch.setattr(wideresnet, "Folded", lambda *given: folds.append(given) or honest(*given))
    TorchEngine(shipped, "cpu", 1, "bf16")  # as a GPU in fp32, too
    assert len(folds) == 1


@pytest.mark.parametrize("road", ["onnx", "torch", "gpu"])
def test_of_no_image_there_are_no_rows(roads, shipped, chains, gpu, road):
    engine, none = gpu(shipped) if road == "gpu" else roads[road], chains.rows(slice(0))
    given = engine.classify(none.image)
    assert [values.shape for values in given] == [(0, *values.shape[1:]) for values in roads["onnx"].classify(chains.image)]
    assert [values.shape for values in engine.score(none.image, none.label)] == [(0, 3, 32, 32), (0,)]
    assert engine.advance(none, 3).image.shape == (0, 3, 32, 32)


def test_a_gpus_engine_is_opened_while_no_other_thread_uses_the_gpu(shipped, monkeypatch):
    """A capture that another thread makes meanwhile would meet the copies of the weights."""
    held = []

    class Net:
        head = None

        def to(self, device):
            Thread(target=lambda: held.append((device.type, not eager.DEVICE_LOCK.acquire(blocking=False)))).start()
            until(lambda: held)
            return self

        def folded_features(self, dtype):
            return None

        def folded(self, dtype, features):
            return None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    TorchEngine(shipped, "cuda", model=Net())
    assert held == [("cuda", True)]


@pytest.mark.parametrize("call", ["classify", "score"])
def test_on_the_cpu_no_engine_waits_for_another(shipped, chains, call):
    """A refresh verifies the next model in a thread beside the one that answers: only a GPU is used one after the other."""
    engine, done = TorchEngine(shipped, "cpu"), Queue()
    asked = {"classify": lambda: engine.classify(chains.image), "score": lambda: engine.score(chains.image, chains.label)}[call]
    with eager.DEVICE_LOCK:
        Thread(target=lambda: done.put(asked()), daemon=True).start()
        assert len(done.get(timeout=20)) == {"classify": 3, "score": 2}[call]


def test_an_engine_turns_tf32_off_for_good(shipped):
    """Two threads that each restore what they found could leave it on: nothing is restored."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        engine = TorchEngine(shipped, "cpu")
        engine.classify(np.zeros((1, 3, 32, 32), np.float32))
        flags = torch.backends.cudnn
        assert (flags.allow_tf32, flags.benchmark, flags.deterministic) == (False, False, True)


# providers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "fix"), [("cuda", r"pip install -e .*\[gpu\]"), ("tensorrt", r"\[gpu,tensorrt\].*NVIDIA's own package index")]
)
def test_a_provider_asked_for_and_missing_is_an_error_that_names_the_fix(shipped, device, fix):
    if providers.BY_DEVICE[device] in ort.get_available_providers() or (device == "tensorrt" and providers.tensorrt_version()):
        pytest.skip("this machine has it")
    with pytest.raises(EngineError, match=fix):
        OnnxEngine(shipped, device)


def test_a_provider_that_is_listed_and_does_not_load_is_an_error(shipped, monkeypatch):
    """onnxruntime-gpu lists CUDA on a machine without a GPU, and then runs on the CPU without a word."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CUDA, providers.CPU])
    if providers.CUDA in ort.capi._pybind_state.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.warns(UserWarning, match="not in available provider"), pytest.raises(EngineError, match="runs on CPUExecutionProvider"):
        OnnxEngine(shipped, "cuda")


def test_tensorrt_that_is_installed_and_does_not_load_is_an_error_with_the_librarys_name(shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.TENSORRT, providers.CUDA, providers.CPU])
    monkeypatch.setattr(providers, "tensorrt_version", lambda: "10.16.1.11")
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").touch()
    (tmp_path / "tensorrt_libs" / "libnvinfer.so.10").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EngineError, match=r"libnvinfer\.so\.10 does not load.*tensorrt_libs"):
        OnnxEngine(shipped, "tensorrt")


def test_fp32_on_a_gpu_is_not_tf32(shipped, monkeypatch):
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    with providers.options_for(providers.CUDA, shipped, shipped.path / "classify.onnx") as wanted:
        assert [name for name, _ in wanted] == [providers.CUDA, providers.CPU]
        assert wanted[0][1]["use_tf32"] == "0"


def test_no_session_goes_on_with_other_providers_on_its_own(roads):
    for name in ("classify", "score", "step"):
        roads["onnx"].warm(name)
        assert not roads["onnx"]._session(name, 1)._enable_fallback


def test_a_graph_of_other_weights_is_not_run(shipped):
    files = {**shipped.manifest.files, "weights.safetensors": shipped.manifest.files["prior.safetensors"]}
    with pytest.raises(BundleError, match="exported from other weights"):
        OnnxEngine(Bundle(shipped.path, replace(shipped.manifest, files=files)), "cpu")


def test_a_graph_that_cannot_be_opened_is_an_engine_error(shipped, tmp_path):
    shutil.copytree(shipped.path, tmp_path / "bundle")
    (tmp_path / "bundle" / "classify.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot open"):
        OnnxEngine(Bundle(tmp_path / "bundle", shipped.manifest), "cpu")


@pytest.mark.parametrize(
    ("kind", "device", "precision", "fix"),
    [
        ("torch", "tensorrt", "fp32", "--engine onnx --device tensorrt"),
        ("auto", "tensorrt", "bf16", "--precision fp32 or --engine onnx --device tensorrt --precision fp16"),
        ("onnx", "tensorrt", "int8", "--precision fp16"),
        ("torch", "cpu", "int8", "--engine onnx"),
        ("onnx", "cpu", "bf16", "--engine torch"),
    ],
)
def test_a_combination_that_no_engine_has_names_one_that_exists(shipped, kind, device, precision, fix):
    with pytest.raises(EngineError) as error:
        load_engine(shipped, kind, device, 1, precision)
    assert fix in error.value.advised()


def test_placement_counts_operators_by_provider(roads, chains):
    roads["onnx"].advance(chains, 1)
    placed = roads["onnx"].placement()
    assert placed["step"]["CPUExecutionProvider"] > placed["classify"]["CPUExecutionProvider"] > 20


def test_auto_takes_what_there_is(shipped):
    engine = load_engine(shipped)
    assert engine.provider in engine.placement()["classify"]
    assert (engine.name, engine.precision) == ("onnx", "fp32")


# TensorRT's engines ------------------------------------------------------------------------------------------------------

FACTS = {
    "gpu": "NVIDIA H200, 9.0, 580.65",
    "tensorrt": "10.13.2",
    "graph": "aa",
    "weights": "bb",
    "tf32": "0",
    "batches": [1, 32, 256],
}


@pytest.fixture
def engine_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_CACHE", str(tmp_path))
    folder = providers.engine_folder(FACTS)
    folder.mkdir(parents=True)
    (folder / "trt_0.engine").write_bytes(b"an engine")
    return folder


def test_a_sealed_engine_is_kept(engine_dir):
    providers.seal(engine_dir, FACTS)
    providers.clear_unless_ready(engine_dir, FACTS)
    assert (engine_dir / "trt_0.engine").is_file()


@pytest.mark.parametrize("fact", ["gpu", "tensorrt", "graph", "weights", "tf32", "batches"])
def test_another_gpu_version_graph_or_profile_is_another_engine(engine_dir, fact):
    other = {**FACTS, fact: "another"}
    assert providers.engine_folder(other) != engine_dir
    providers.seal(engine_dir, FACTS)
    providers.clear_unless_ready(engine_dir, other)  # a folder carried here from elsewhere under this name
    assert not engine_dir.exists()


def spoil(folder):
    (folder / "trt_0.engine").write_bytes(b"another engine")


def lose(folder):
    (folder / "trt_0.engine").unlink()


def plant(folder):
    (folder / "trt_1.engine").write_bytes(b"an engine of somebody else's")


def half_seal(folder):
    (folder / "engine.json").write_text('{"gpu":')


def no_files(folder):
    seal = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**seal, "files": {}}))


def not_an_object(folder):
    (folder / "engine.json").write_text("[]")


@pytest.mark.parametrize("damage", [spoil, lose, plant, half_seal, no_files, not_an_object])
def test_a_damaged_or_half_built_engine_is_built_again(engine_dir, damage):
    providers.seal(engine_dir, FACTS)
    damage(engine_dir)
    providers.clear_unless_ready(engine_dir, FACTS)
    assert not engine_dir.exists()


def test_the_profile_names_every_input_of_the_graph(shipped, tmp_path):
    options = providers.tensorrt_options(tmp_path, shipped, shipped.path / "step.onnx")
    assert options["trt_profile_max_shapes"].startswith("image:256x3x32x32,label:256,key:256x4x4,step:256,step_size:256")
    assert options["trt_fp16_enable"] == "0"
    assert options["trt_engine_cache_path"] == str(tmp_path)


# graphs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_say_what_they_are_and_hold_no_weights(shipped, name):
    graph = onnx.load(shipped.path / name, load_external_data=False)
    about = {entry.key: entry.value for entry in graph.metadata_props}
    m = shipped.manifest
    assert m.version.startswith(about.pop("version"))  # a revision adds precisions, on the same graphs
    assert about == {
        "name": m.name,
        "weights": m.files["weights.safetensors"].sha256,
        "precision": "fp32",
    }
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [20]
    inside = sum(len(t.raw_data) for t in graph.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
    assert inside < 16 * 1024
    elsewhere = {e.value for t in graph.graph.initializer for e in t.external_data if e.key == "location"}
    assert elsewhere == {"weights.safetensors"}


def test_the_floor_counts_every_product_of_the_graph(shipped):
    graph = onnx.shape_inference.infer_shapes(onnx.load(shipped.path / "classify.onnx"))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.value_info}
    weights = {t.name: list(t.dims) for t in graph.graph.initializer}
    total = 0
    for node in graph.graph.node:
        if node.op_type == "Conv":
            total += 2 * int(np.prod(weights[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += 2 * 128 * 10
    assert operations(shipped)["classify"] == total
    assert operations(shipped)["step"] == 2 * total


def test_a_precision_that_the_bundle_lacks_names_the_command(shipped, tmp_path):
    names = {name: entry for name, entry in shipped.manifest.files.items() if ".fp16." not in name}
    bare = Bundle(shipped.path, replace(shipped.manifest, files=names))
    with pytest.raises(BundleError, match=r"training/precision\.py BUNDLE --precision fp16"):
        OnnxEngine(bare, "cpu", 1, "fp16")


def test_two_probe_steps_are_in_the_self_test(shipped, roads):
    from safetensors.numpy import load_file

    expected = load_file(shipped.path / "selftest.safetensors")
    moved = roads["onnx"].advance(Chains.at(expected["image"], PROBE, expected["label"], seed=0), 2).image
    np.testing.assert_allclose(moved, expected["moved"], atol=1e-5)
