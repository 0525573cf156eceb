"""Which ONNX Runtime provider runs a graph, with what options, and where TensorRT's engines are kept."""

import hashlib
import json
import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ebjdat_serve.bundle import Bundle, read_json, sha256, write_json
from ebjdat_serve.engines import Device, Precision
from ebjdat_serve.errors import BundleError, EngineError

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = (CUDA, TENSORRT)
BY_DEVICE: dict[Device, str] = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
BATCHES = (1, 32, 256)
"""The batches that TensorRT's engines are made for: smallest, best, largest."""
SEAL = "engine.json"
Facts = dict[str, Any]


def chosen(device: Device) -> str:
    """Return the provider to ask for; ``auto`` is CUDA where this ONNX Runtime has it, else the CPU: TensorRT only by name.

    Raises EngineError when a provider asked for by name is not to be had here.
    """
    available = ort.get_available_providers()
    if device == "auto":
        return CUDA if CUDA in available else CPU
    wanted = BY_DEVICE[device]
    if wanted not in available:
        raise EngineError(f"--device {device}: this ONNX Runtime has no {wanted}: pip install 'ebjdat-serve[gpu]', or use --device cpu")
    if wanted == TENSORRT and tensorrt_version() is None:
        raise EngineError(
            "--device tensorrt: TensorRT 10 is not installed: pip install 'ebjdat-serve[gpu,tensorrt]' (its libraries come from NVIDIA's "
            "own package index, not from PyPI), or use --device cuda"
        )
    return wanted


def options_for(provider: str, bundle: Bundle, graph: Path, precision: Precision) -> list[tuple[str, dict[str, str]]]:
    """Return ONNX Runtime's list of providers: the one wanted, then what runs the operators it does not know."""
    if provider == CPU:
        return [(CPU, {})]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    # TF32 would move energies by 1e-3, and a threshold with them: fp32 means fp32, and fp16 is there for speed
    cuda = (CUDA, {"device_id": "0", "use_tf32": "0"})
    if provider == CUDA:
        return [cuda, (CPU, {})]
    facts = engine_facts(graph, precision)
    folder = engine_folder(facts)
    clear_unless_ready(folder, facts)
    return [(TENSORRT, tensorrt_options(folder, bundle, graph, precision)), cuda, (CPU, {})]


def tensorrt_options(folder: Path, bundle: Bundle, graph: Path, precision: Precision) -> dict[str, str]:
    """Return the provider's options: a cache in ``folder``, one optimisation profile over ``BATCHES``, and the graph's own precision."""
    folder.mkdir(parents=True, exist_ok=True)
    size = bundle.manifest.input
    each = {"image": f"x3x{size.height}x{size.width}", "key": "x4x4"}
    inputs = [entry.name for entry in ort.InferenceSession(graph, providers=[CPU]).get_inputs()]
    shapes = [",".join(f"{name}:{batch}{each.get(name, '')}" for name in inputs) for batch in BATCHES]
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_int8_enable": "1" if precision == "int8" else "0",
        **{f"trt_profile_{name}_shapes": shape for name, shape in zip(("min", "opt", "max"), shapes, strict=True)},
    }


def engine_facts(graph: Path, precision: Precision) -> Facts:
    """Return all that a TensorRT engine depends on: an engine made under other facts is another engine."""
    return {
        "gpu": gpu_name(),
        "tensorrt": tensorrt_version(),
        "onnxruntime": ort.__version__,
        "graph": sha256(graph),
        "weights": sha256(graph.with_name("weights.safetensors")),
        "precision": precision,
        "batches": list(BATCHES),
    }


def engine_folder(facts: Facts) -> Path:
    """Return where the engine of these facts is kept: EBJDAT_CACHE (~/.cache/ebjdat_serve)/tensorrt/HASH, never in a bundle."""
    root = Path(os.environ.get("EBJDAT_CACHE", "~/.cache/ebjdat_serve")).expanduser()
    return root / "tensorrt" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def seal(folder: Path, facts: Facts) -> None:
    """Write down what made the engine in ``folder`` and what its files are: an engine without this is not loaded."""
    if ready(folder, facts):
        return
    files = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != SEAL}
    write_json(folder / SEAL, {**facts, "files": files})


def ready(folder: Path, facts: Facts) -> bool:
    """Return whether ``folder`` holds a whole engine made under just these facts."""
    try:
        found = read_json(folder / SEAL)
        files = found.pop("files")
        there = {file.name for file in folder.iterdir()} - {SEAL}
        return bool(files) and found == facts and there == set(files) and all(sha256(folder / name) == files[name] for name in files)
    except (BundleError, OSError, KeyError, TypeError, AttributeError):
        return False


def clear_unless_ready(folder: Path, facts: Facts) -> None:
    """Remove a stale, foreign, damaged or half-built engine, so that TensorRT builds anew instead of loading it."""
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
    """Return name, compute capability and driver of the first GPU; raise EngineError where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"no NVIDIA GPU answers nvidia-smi here ({error}): use --device cpu") from error
