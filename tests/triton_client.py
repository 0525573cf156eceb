"""What tests/test_v2_clients.py has tritonclient[http] do, in an environment that has it and nothing of this project: prints JSON.

    python triton_client.py HOST:PORT MODEL VERSION FOLDER

FOLDER has images.npy (N, H, W, 3) uint8 and the same pictures as 0.png, 1.png, ...
"""

import asyncio
import base64
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as http
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

ADDRESS, MODEL, VERSION, FOLDER = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
PIXELS = np.load(FOLDER / "images.npy")
FILES = [(FOLDER / f"{i}.png").read_bytes() for i in range(len(PIXELS))]
NAMES = ("logits", "probabilities", "energy", "suspicion", "p_value", "suspicious", "label", "class")


def inputs(module, kind, *, binary):
    """The pictures as one input."""
    values = PIXELS if kind == "UINT8" else np.array(FILES if binary else [base64.b64encode(one) for one in FILES], np.object_)
    given = module.InferInput("image", list(values.shape), kind)
    given.set_data_from_numpy(values, binary_data=binary)
    return [given]


def outputs(module, *, binary):
    return [module.InferRequestedOutput(name, binary_data=binary) for name in NAMES]


def plain(result):
    """The outputs of an answer as JSON, labels as text whichever way they came."""
    found = {}
    for name in NAMES:
        value = result.as_numpy(name)
        found[name] = [one.decode() if isinstance(one, bytes) else one for one in value.tolist()] if value is not None else None
    said = result.get_response()
    return {"id": said.get("id"), "model": said["model_name"], "version": said["model_version"], "outputs": found}


def error(act):
    try:
        act()
    except InferenceServerException as refused:
        return [refused.status(), refused.message()]
    return None


def infers(client):
    """Every kind of input, output, compression and version, by name."""
    for kind in ("BYTES", "UINT8"):
        for binary in (True, False):
            for wanted in ("all", "binary", "json"):
                for pack in (None, "gzip", "deflate"):
                    for version in ("", VERSION):
                        name = f"{kind} {'binary' if binary else 'json'} to {wanted} {pack} {version}"
                        options = {"model_version": version, "request_id": name}
                        options |= {"request_compression_algorithm": pack, "response_compression_algorithm": pack}
                        asked = None if wanted == "all" else outputs(http, binary=wanted == "binary")
                        yield name, plain(client.infer(MODEL, inputs(http, kind, binary=binary), outputs=asked, **options))


async def later():
    """The asyncio client."""
    async with aio.InferenceServerClient(ADDRESS) as client:
        one = await client.infer(MODEL, inputs(http, "UINT8", binary=True), request_id="aio", request_compression_algorithm="gzip")
        many = await asyncio.gather(*(client.infer(MODEL, inputs(http, "BYTES", binary=True), request_id=f"aio{i}") for i in range(8)))
        return {
            "ready": [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready(MODEL, VERSION)],
            "metadata": await client.get_model_metadata(MODEL),
            "infers": {(told := plain(result))["id"]: told for result in (one, *many)},
        }


def main():
    client = http.InferenceServerClient(ADDRESS, concurrency=4)
    waiting = [client.async_infer(MODEL, inputs(http, "UINT8", binary=True), request_id=f"async{i}") for i in range(8)]
    said = {
        "ready": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(MODEL), client.is_model_ready(MODEL, VERSION)],
        "unready": [client.is_model_ready("none"), client.is_model_ready(MODEL, "0")],
        "server": client.get_server_metadata(),
        "metadata": [client.get_model_metadata(MODEL), client.get_model_metadata(MODEL, VERSION)],
        "config": client.get_model_config(MODEL),
        "index": client.get_model_repository_index(),
        "stats": [client.get_inference_statistics(), client.get_inference_statistics(MODEL, VERSION)],
        "errors": {
            "model": error(lambda: client.infer("none", inputs(http, "UINT8", binary=True))),
            "version": error(lambda: client.infer(MODEL, inputs(http, "UINT8", binary=True), model_version="0")),
            "output": error(lambda: client.infer(MODEL, inputs(http, "UINT8", binary=True), outputs=[http.InferRequestedOutput("x")])),
            "load": error(lambda: client.load_model(MODEL)),
        },
        "infers": dict(infers(client)) | {(told := plain(one.get_result()))["id"]: told for one in waiting},
        "aio": asyncio.run(later()),
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
