#!/usr/bin/env python3
"""Speed of the engines: `python benchmarks/engines.py [--json FILE] [--network DEPTH WIDTH]`.

Images per second of classify and chain steps per second of generation, by engine, provider, precision and batch, against plain eager
torch in fp32 (contiguous, norms unfolded, noise by randn) and against the floor: the floating-point operations of the function over the
device's rate of matrix products in that precision. All combinations take turns, and the 20th percentile of their times is kept; on one
CPU thread it is CPU time, since other processes delay long calls always and short ones seldom. A combination that cannot run here is
listed with the reason.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for machines where the package cannot be installed

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.energy import energy, score
from ebjdat_serve.engines import Device, Engine, EngineKind, Precision, load_engine
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.sgld import Chains, Sampler, langevin_step

Row = dict[str, Any]
Road = tuple[EngineKind, Device, Precision]
SAMPLER = Sampler(steps=1, step_size=0.25, grad_clip=2.0, noise_std=0.005)
ON_CPU: list[Road] = [
    ("torch", "cpu", "fp32"),
    ("torch", "cpu", "bf16"),
    ("onnx", "cpu", "fp32"),
    ("onnx", "cpu", "fp16"),
    ("onnx", "cpu", "int8"),
]
ON_GPU: list[Road] = [
    ("torch", "cuda", "fp32"),
    ("torch", "cuda", "bf16"),
    ("onnx", "cuda", "fp32"),
    ("onnx", "cuda", "fp16"),
    ("onnx", "tensorrt", "fp32"),
    ("onnx", "tensorrt", "fp16"),
]
STEPS = 4
"""Langevin steps per timed call; images are copied to the host at the end, as in a server."""


class Eager:
    """The baseline: the unmodified model in eager mode, contiguous."""

    def __init__(self, bundle: Bundle, device: torch.device, *, tf32: bool) -> None:
        self.model, self.device, self.tf32 = load_model(bundle).to(device), device, tf32

    def classify(self, image: np.ndarray) -> None:
        """Classify and copy the result to the host."""
        with torch.inference_mode(), self.context():
            logits = self.model(torch.from_numpy(image).to(self.device))
            energy(logits).cpu()
            logits.cpu()

    def advance(self, chains: Chains, steps: int) -> None:
        """Take Langevin steps and copy the images to the host."""
        x, y = torch.from_numpy(chains.image).to(self.device), torch.from_numpy(chains.label).to(self.device)
        with self.context():
            for _ in range(steps):
                x = langevin_step(x, score(self.model, x, y)[0], torch.randn_like(x), SAMPLER)
        x.cpu()

    def context(self) -> Any:
        """Return the context that sets whether cuDNN may use TF32."""
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=not self.tf32, allow_tf32=self.tf32)


def roads(bundle: Bundle, wanted: list[Road]) -> tuple[dict[str, Engine], list[Row]]:
    """Return the engines that run here by name, and a row with the reason for each other."""
    found: dict[str, Engine] = {}
    missing: list[Row] = []
    for kind, device, precision in wanted:
        name = f"{kind} {device} {precision}"
        try:
            engine = load_engine(bundle, kind, device, torch.get_num_threads(), precision)
            size, label = bundle.manifest.input, np.zeros(1, np.int64)
            image = np.zeros((1, 3, size.height, size.width), np.float32)
            engine.classify(image)
            engine.advance(Chains.at(image, SAMPLER, label, seed=0), 1)
            found[name] = engine
        except Exception as error:  # noqa: BLE001 (no memory, no kernel; ONNX Runtime's errors have no common class)
            why = (str(error).splitlines() or [type(error).__name__])[0]
            missing.append({"name": name, "value": None, "unit": "unmeasured", "why": why})
    return found, missing


def clock(device: torch.device) -> Callable[[], float]:
    """Return the clock: CPU time if one CPU thread does all the work."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Return the 20th percentile of each call's seconds, calls taking turns for at least 10 rounds and ``seconds``."""
    now = clock(device)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[next(iter(calls))]) < 10:
        for name, call in calls.items():
            began = now()
            call()
            times[name].append(now() - began)
    return {name: float(np.percentile(taken, 20)) for name, taken in times.items()}


def measure(
    bundle: Bundle,
    batches: list[int],
    wanted: list[Road],
    device: torch.device,
    seconds: float,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Return the rows of every engine, batch and function; ``keep`` is given those that there are after each."""
    engines, rows = roads(bundle, wanted)
    size = bundle.manifest.input
    baselines = {"eager torch fp32": Eager(bundle, device, tf32=False)}
    if device.type == "cuda":
        baselines["eager torch TF32"] = Eager(bundle, device, tf32=True)
    rates = {
        name: matmul_rate(device, dtype) for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16))
    }
    rows += [{"name": f"matmul {name}", "value": rate / 1e9, "unit": "GFLOP/s"} for name, rate in rates.items()]
    work = operations(bundle)
    for batch in batches:
        image = np.random.default_rng(0).random((batch, 3, size.height, size.width), dtype=np.float32)
        chains = Chains.at(image, SAMPLER, np.arange(batch) % len(bundle.manifest.labels), seed=0)
        everything: dict[str, Any] = {**baselines, **engines}
        calls = {
            "classify": {name: partial(engine.classify, image) for name, engine in everything.items()},
            # int8 takes its steps in fp32
            "step": {name: partial(engine.advance, chains, STEPS) for name, engine in everything.items() if not name.endswith("int8")},
        }
        for function, unit, per_call in (("classify", "images/s", 1), ("step", "chain steps/s", STEPS)):
            timed = interleaved(calls[function], seconds, device)
            for name, taken in timed.items():
                each = taken / per_call
                about = {"provider": engines[name].provider} if name in engines else {}
                label = f"{name} {function} batch {batch}"
                rows.append({"name": label, "value": batch / each, "unit": unit, "ms": each * 1e3, **about})
                rows += [
                    {"name": f"ratio {label} / {base}", "value": timed[base] / taken, "unit": "ratio"} for base in baselines if base != name
                ]
                precision = name.rsplit(" ", 1)[1]
                if precision in rates and not (device.type == "cpu" and precision == "fp16"):  # a CPU computes fp16 in fp32
                    share = work[function] * batch / rates[precision] / each
                    rows.append({"name": f"ratio floor / {label}", "value": share, "unit": "ratio"})
            report(rows, function, batch)
            keep(rows)
    return rows


def report(rows: list[Row], function: str, batch: int) -> None:
    """Print one block of the table."""
    ratios = {row["name"]: row["value"] for row in rows if row["unit"] == "ratio"}
    print(f"\n{function}, batch {batch}")
    for row in rows:
        if row["name"].endswith(f" {function} batch {batch}") and row["unit"] != "ratio":
            over, share = ratios.get(f"ratio {row['name']} / eager torch fp32"), ratios.get(f"ratio floor / {row['name']}")
            tail = (f"{over:8.2f} x eager" if over else " " * 16) + (f"{share:8.0%} of the floor" if share else "")
            name = row["name"].removesuffix(f" {function} batch {batch}")
            print(f"  {name:24}{row['value']:12.1f} {row['unit']:16}{row['ms']:10.3f} ms{tail}", flush=True)


def table(rows: list[Row]) -> str:
    """Return a Markdown table: a line per engine, a column per function and batch; images or chain steps per second, and x eager."""
    values = {row["name"]: row["value"] for row in rows}
    cases = list(dict.fromkeys(row["name"].split(" ", 3)[-1] for row in rows if row["unit"] in ("images/s", "chain steps/s")))
    roads = list(dict.fromkeys(row["name"].rsplit(" ", 3)[0] for row in rows if row["unit"] in ("images/s", "chain steps/s")))
    lines = [f"| | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for road in roads:
        cells = []
        for case in cases:
            value, ratio = values.get(f"{road} {case}"), values.get(f"ratio {road} {case} / eager torch fp32")
            cells.append("" if value is None else f"{value:.0f}" + (f" ({ratio:.2f} x)" if ratio else ""))
        lines.append(f"| {road} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document(text: str, rows: list[Row], bundle: Bundle) -> str:
    """Return docs/engines.md with its tables generated from ``rows`` and the bundle's metrics.json."""
    from training.precision import table as costs

    for name, content in (("speed", table(rows)), ("precision", costs(bundle.metrics()))):
        before, rest = text.split(f"<!-- {name} -->")
        _, after = rest.split(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->{after}"
    return text


def operations(bundle: Bundle) -> dict[str, float]:
    """Return the floating-point operations of one image's classification, and of one chain's step: a forward and an input gradient."""
    model, size = load_model(bundle), bundle.manifest.input
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size.height, size.width))
    forward = float(counter.get_total_flops())
    return {"classify": forward, "step": 2 * forward}  # the input gradient of a convolution has as many products as the convolution


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of the fastest of several square matrix products, TF32 off."""
    best, now = 0.0, clock(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    for n in (4096, 8192) if device.type == "cuda" else (384, 768, 1536):
        a, b = (torch.rand(n, n, device=device).to(dtype) for _ in "ab")
        for _ in range(6):
            began = now()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (now() - began))
        if device.type == "cpu" and dtype == torch.float16:
            break  # emulated: the figure is not used
    return best


def random_bundle(folder: Path, depth: int, width: int, *, graphs: bool = True) -> Bundle:
    """Return the shipped bundle with a random network of another depth and width, to measure time only; with or without its ONNX graphs."""
    from safetensors.torch import save_file

    from ebjdat_serve.networks import architecture_of

    shipped = json.loads((SHIPPED / "bundle.json").read_text(encoding="utf-8"))
    architecture = {"family": "wideresnet", "depth": depth, "width": width}
    write_json(folder / "bundle.json", {**shipped, "name": f"random-{depth}-{width}", "architecture": architecture, "files": {}})
    torch.manual_seed(0)
    save_file(architecture_of(architecture).build(len(shipped["labels"])).state_dict(), folder / "weights.safetensors")
    bundle = Bundle.draft(folder).update("weights.safetensors")
    if not graphs:
        return bundle
    try:
        from export.to_onnx import export, write

        bundle = export(bundle)
        return bundle.update(write(bundle, "classify", "fp16"), write(bundle, "step", "fp16"))
    except Exception as error:  # noqa: BLE001 (another torch exports otherwise, or not at all; torch's own roads do without)
        print(f"no graphs, so no ONNX Runtime: {type(error).__name__}: {error}", flush=True)
        return bundle


def runs_graphs(device: torch.device) -> bool:
    """Return whether ONNX Runtime computes on the device: a build for CPUs runs no graph on a GPU, so none need be exported."""
    try:
        from ebjdat_serve.engines.providers import available
    except ImportError:
        return False
    return device.type != "cuda" or "CUDAExecutionProvider" in available()


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bundle", type=Path, default=SHIPPED)
    parser.add_argument("--network", type=int, nargs=2, metavar=("DEPTH", "WIDTH"), help="random weights instead of a bundle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", help="1 8 32 on a CPU, 1 32 256 on a GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each batch and function")
    parser.add_argument("--tensorrt", action="store_true", help="measure TensorRT, which builds engines for minutes, and nothing else")
    parser.add_argument("--without-graphs", action="store_true", help="with --network: export nothing, so measure no ONNX Runtime")
    parser.add_argument("--docs", type=Path, help="the document whose tables are generated from --json and the bundle's metrics")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = options.batch or ([1, 32, 256] if device.type == "cuda" else [1, 8, 32])
    wanted = [road for road in (ON_GPU if device.type == "cuda" else ON_CPU) if (road[1] == "tensorrt") == options.tensorrt]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        graphs = not options.without_graphs and runs_graphs(device)
        bundle = random_bundle(Path(folder), *options.network, graphs=graphs) if options.network else Bundle.load(options.bundle)
        a = bundle.manifest.architecture
        about = {"device": name, "threads": options.threads, "torch": torch.__version__, "network": f"WRN-{a['depth']}-{a['width']}"}

        def keep(rows: list[Row]) -> None:
            if options.json:
                write_json(options.json, [{**row, **about} for row in rows])

        rows = measure(bundle, batches, wanted, device, options.seconds, keep)
        keep(rows)
    for row in rows:
        if row["unit"] == "unmeasured":
            print(f"unmeasured: {row['name']}: {row['why']}")
    if options.docs:
        options.docs.write_text(document(options.docs.read_text(encoding="utf-8"), rows, bundle), encoding="utf-8")


if __name__ == "__main__":
    main()
