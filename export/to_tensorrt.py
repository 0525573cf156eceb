#!/usr/bin/env python3
"""Build TensorRT engines of a bundle for the GPU at hand: `python export/to_tensorrt.py BUNDLE [--precision fp16]`.

Through ONNX Runtime's TensorRT provider, with its cache outside the bundle: one engine per graph, one optimisation profile over batches
1, 32 and 256, in the graph's precision. `ebjdat-serve serve BUNDLE --device tensorrt` also builds missing engines, but is not ready for
minutes then. The cache key is a hash of GPU, driver, TensorRT, ONNX Runtime, graph, weights, precision and batches; an engine with
changed files is rebuilt.
"""

import time
from pathlib import Path

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.engines import Precision, check_onnxruntime

FUNCTIONS = ("classify", "score", "step")


def build(bundle: Bundle, precision: Precision) -> None:
    """Build the engine of every graph; raise EngineError where TensorRT cannot run, BundleError where it fails the self-test."""
    from ebjdat_serve.engines.ort import OnnxEngine
    from ebjdat_serve.engines.providers import engine_facts, engine_folder, ready
    from ebjdat_serve.selftest import verify

    check_onnxruntime()
    engine = OnnxEngine(bundle, "tensorrt", precision=precision)
    for function in FUNCTIONS:
        facts = engine_facts(bundle.graph(function, precision))
        kept, began = ready(engine_folder(facts), facts), time.monotonic()
        engine.warm(function)
        print(
            f"{function} {precision}: {'kept' if kept else 'built'} in {engine_folder(facts)}, {time.monotonic() - began:.0f} s", flush=True
        )
    for name, worst in verify(bundle, engine).items():
        print(f"self-test {name}: largest difference {worst:.1e} of the largest value")
    print(f"operators by provider: {engine.placement()}")


def main() -> None:
    """Build the engines of the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    options = parser.parse_args()
    with command(parser):
        build(Bundle.load(options.bundle), options.precision)


if __name__ == "__main__":
    main()
