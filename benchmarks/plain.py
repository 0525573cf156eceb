#!/usr/bin/env python3
"""Baseline server for benchmarks: plain FastAPI and Pillow, with the forward in the request handler.

`python benchmarks/plain.py PORT [BUNDLE [torch|onnx [THREADS]]]`: POST /classify takes an image body, or {"images": [base64, ...]}.
With THREADS, images are decoded and classified in so many threads, not in the event loop.
"""

import asyncio
import base64
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import given, load_engine
from ebjdat_serve.server.settings import SHIPPED


def main() -> None:
    """Serve."""
    bundle = Bundle.load(Path(sys.argv[2]) if len(sys.argv) > 2 else SHIPPED)
    engine, m = load_engine(bundle, "onnx" if "onnx" in sys.argv else "torch", "cpu", 1), bundle.manifest
    app, pool = FastAPI(), ThreadPoolExecutor(int(sys.argv[4])) if len(sys.argv) > 4 else None

    @app.post("/classify")
    async def classify(request: Request) -> Any:
        if "json" in request.headers.get("content-type", ""):
            pictures = [base64.b64decode(one) for one in (await request.json())["images"]]
        else:
            pictures = [await request.body()]
        return await asyncio.get_running_loop().run_in_executor(pool, answer, pictures) if pool else answer(pictures)

    def answer(pictures: Sequence[bytes]) -> Any:
        image = pixels.to_unit(np.stack([pixels.decode(one, m.input) for one in pictures]))
        logits, energy, _ = engine.classify(image)
        likely = probabilities(logits, 1.0)
        rows = zip(likely.argmax(1).tolist(), likely.max(1).tolist(), given(energy, "energy").tolist(), strict=True)
        return [{"class": label, "label": m.labels[label], "probability": p, "energy": e} for label, p, e in rows]

    @app.get("/health")
    async def health() -> str:
        return "ok"

    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
