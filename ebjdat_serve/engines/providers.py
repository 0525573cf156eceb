"""ONNX Runtime providers: their choice and options, and the cache of TensorRT engines."""

import ctypes
import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ebjdat_serve.bundle import Bundle, read_json, sha256, write_json
from ebjdat_serve.engines import Device, Precision
from ebjdat_serve.errors import BundleError, EngineError
from ebjdat_serve.folders import ensure_folder, folder
from ebjdat_serve.install import install
from ebjdat_serve.locking import exclusive_lock

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = (CUDA, TENSORRT)
BY_DEVICE: dict[Device, str] = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
BATCHES = (1, 32, 256)
"""The batch sizes of TensorRT's optimisation profile: smallest, best, largest."""
BUCKETS = (1, 4, 16, 64, 256)
"""The batch sizes that CUDA computes: cuDNN plans every convolution anew where the size changes (onnxruntime#23006)."""
UNPROFILED = "no associated shape profiles"
"""What ONNX Runtime says where TensorRT takes a part of the graph alone, whose inputs no profile of the whole graph names."""
SEAL = "engine.json"
Facts = dict[str, Any]
Wanted = list[tuple[str, dict[str, str]]]
log = logging.getLogger("ebjdat_serve")


def chosen(device: Device, precision: Precision) -> str:
    """Return the provider to use; ``auto`` is CUDA if this ONNX Runtime has it, else the CPU, and never TensorRT.

    Raises EngineError when a provider chosen by name is not available, or does not support ``precision``.
    """
    if precision == "bf16":
        raise EngineError("bf16 runs on the torch engine, on a CPU or CUDA", options=("--engine torch --device cpu", "--precision fp16"))
    if device == "tensorrt" and precision == "int8":
        raise EngineError("int8 runs on CPUs: TensorRT takes only symmetric ranges", options=("--precision fp16",))
    listed = available()
    if device == "auto":
        if CUDA not in listed and gpu_build():
            log.warning("ONNX Runtime's GPU build lists no CUDA here, so the CPU computes: check the driver and CUDA's libraries")
        return CUDA if CUDA in listed else CPU
    wanted = BY_DEVICE[device]
    if wanted == TENSORRT and (tensorrt_version() is None or wanted not in listed):
        raise EngineError(
            f"TensorRT needs ONNX Runtime's GPU build and TensorRT 10: {install('gpu,tensorrt')} (its libraries come from NVIDIA's own "
            "package index, not from PyPI)",
            options=("--device cuda",),
        )
    if wanted not in listed:
        raise EngineError(f"this ONNX Runtime has no {wanted}: {install('gpu')}", options=("--device cpu",))
    return wanted


def available() -> list[str]:
    """Return the providers of this ONNX Runtime, CUDA too where its import could not load it yet.

    A wheel that has CUDA as a plugin (``cuda-plugin-ep=1``) registers it when it is imported, before CUDA's libraries of other wheels are
    loaded; to load them registers it again.
    """
    listed: list[str] = ort.get_available_providers()
    if CUDA not in listed and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
        listed = ort.get_available_providers()
    return listed


def gpu_build() -> bool:
    """Return whether this ONNX Runtime was built for CUDA, whatever it lists."""
    return "cuda-plugin-ep=" in ort.get_build_info() or getattr(ort, "cuda_version", "") != ""


def bucket(n: int) -> int:
    """Return the batch size that CUDA computes for ``n`` images, at most the largest bucket."""
    return next((size for size in BUCKETS if size >= n), BUCKETS[-1])


@contextmanager
def options_for(provider: str, bundle: Bundle, graph: Path) -> Iterator[Wanted]:
    """Yield ONNX Runtime's providers while a session is opened: the requested one, then the fallback for operators it lacks.

    TensorRT's engine is locked meanwhile, so that no process removes an engine that another builds, and sealed once the session is open.
    """
    if provider == CPU:
        yield [(CPU, {})]
        return
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    # TF32 would shift energies, and so a threshold, by 1e-3: fp32 means fp32, and fp16 is for speed; a search of all algorithms takes
    # longer than it saves, for it is made again for each batch size
    cuda = (CUDA, {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
    if provider == CUDA:
        yield [cuda, (CPU, {})]
        return
    load_tensorrt()
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT's provider has no option for it
    facts = engine_facts(graph)
    home = engine_folder(facts)
    ensure_folder(home.parent, "EBJDAT_CACHE")
    with exclusive_lock(home.with_suffix(".lock")):
        clear_unless_ready(home, facts)
        wanted = [(TENSORRT, tensorrt_options(home, bundle, graph)), cuda, (CPU, {})]
        if not sealed_with_profile(home):
            drop_profile(wanted)
        yield wanted
        seal(home, facts, profile=has_profile(wanted))


def has_profile(wanted: Wanted) -> bool:
    """Return whether TensorRT is given an optimisation profile."""
    return any(name.startswith("trt_profile_") for name in wanted[0][1])


def drop_profile(wanted: Wanted) -> None:
    """Take TensorRT's profile out of ``wanted``: it then finds the range of each part of the graph from the batches it is run with."""
    wanted[0] = (TENSORRT, {name: value for name, value in wanted[0][1].items() if not name.startswith("trt_profile_")})


def start_again(wanted: Wanted) -> None:
    """Remove what a failed build left in TensorRT's cache, and take the profile out of ``wanted``."""
    home = Path(wanted[0][1]["trt_engine_cache_path"])
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    drop_profile(wanted)


def load_tensorrt() -> None:
    """Load TensorRT's libraries from their wheel, which ONNX Runtime does not search; raise EngineError when they do not load."""
    found = find_spec("tensorrt_libs")
    folder = Path(found.origin).parent if found and found.origin else None
    for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"):
        try:
            ctypes.CDLL(str(folder / name) if folder else name, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EngineError(f"{name} does not load ({error}): {install('gpu,tensorrt')}", options=("--device cuda",)) from error


def tensorrt_options(folder: Path, bundle: Bundle, graph: Path) -> dict[str, str]:
    """Return the provider's options: a cache in ``folder``, one optimisation profile over ``BATCHES``, and the graph's own precision."""
    folder.mkdir(parents=True, exist_ok=True)
    size = bundle.manifest.input
    each = {"image": f"x3x{size.height}x{size.width}", "key": "x4x4"}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # it computes nothing, and by default starts a thread for each core of the host
    inputs = [entry.name for entry in ort.InferenceSession(graph, options, providers=[CPU]).get_inputs()]
    shapes = [",".join(f"{name}:{batch}{each.get(name, '')}" for name in inputs) for batch in BATCHES]
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if ".fp16." in graph.name else "0",  # the graph's precision: fp16 has no score graph
        **{f"trt_profile_{name}_shapes": shape for name, shape in zip(("min", "opt", "max"), shapes, strict=True)},
    }


def engine_facts(graph: Path) -> Facts:
    """Return everything a TensorRT engine depends on; an engine built under other facts is another engine."""
    return {
        "gpu": gpu_name(),
        "tensorrt": tensorrt_version(),
        "onnxruntime": ort.__version__,
        "graph": sha256(graph),
        "weights": sha256(graph.with_name("weights.safetensors")),
        "tf32": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
        "batches": list(BATCHES),
    }


def engine_folder(facts: Facts) -> Path:
    """Return the cache folder of the engine of these facts: EBJDAT_CACHE (~/.cache/ebjdat_serve)/tensorrt/HASH, never in a bundle."""
    return folder("EBJDAT_CACHE") / "tensorrt" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def seal(folder: Path, facts: Facts, *, profile: bool = True) -> None:
    """Write the facts and file hashes of the engine in ``folder``; an engine without them is not loaded."""
    if ready(folder, facts):
        return
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != SEAL}
    write_json(folder / SEAL, {**facts, "files": files, "profile": profile})


def sealed_with_profile(folder: Path) -> bool:
    """Return false for a complete engine that was built without an optimisation profile: another attempt with one would fail again."""
    return not (folder / SEAL).is_file() or read_json(folder / SEAL)["profile"] is not False


def ready(folder: Path, facts: Facts) -> bool:
    """Return whether ``folder`` holds a complete engine built under exactly these facts."""
    try:
        found = read_json(folder / SEAL)
        files, _ = found.pop("files"), found.pop("profile")
        there = {file.name for file in folder.iterdir()} - {SEAL}
        return bool(files) and found == facts and there == set(files) and all(sha256(folder / name) == files[name] for name in files)
    except (BundleError, OSError, KeyError, TypeError, AttributeError):
        return False


def clear_unless_ready(folder: Path, facts: Facts) -> None:
    """Remove a stale, foreign, damaged or half-built engine, so that TensorRT rebuilds it instead of loading it."""
    if folder.exists() and not ready(folder, facts):
        shutil.rmtree(folder)


def tensorrt_version() -> str | None:
    """Return the version of the TensorRT 10 wheel, or None."""
    for name in ("tensorrt-cu13", "tensorrt_cu13_libs", "tensorrt"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return found if found.startswith("10.") else None
    return None


def gpu_name() -> str:
    """Return name, compute capability and driver of the first visible GPU; raise EngineError where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader", "-i", first]
        return subprocess.run(query, capture_output=True, encoding="utf-8", check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"no NVIDIA GPU answers nvidia-smi here ({error})", options=("--device cpu",)) from error
