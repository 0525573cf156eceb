"""What tests/test_v2_clients.py has the kserve client do, in an environment that has it and nothing of this project: prints JSON.

    python kserve_client.py URL MODEL VERSION FOLDER

FOLDER has images.npy (N, H, W, 3) uint8 and the same pictures as 0.png, 1.png, ...
"""

import asyncio
import base64
import json
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

URL, MODEL, VERSION, FOLDER = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
PIXELS = np.load(FOLDER / "images.npy")
FILES = [(FOLDER / f"{i}.png").read_bytes() for i in range(len(PIXELS))]


def request(kind, model, *, binary, wanted, name):
    values = PIXELS if kind == "UINT8" else np.array(FILES if binary else [base64.b64encode(one) for one in FILES], np.object_)
    given = InferInput("image", list(values.shape), kind)
    given.set_data_from_numpy(values, binary_data=binary)
    names = ("logits", "probabilities", "energy", "suspicion", "p_value", "suspicious", "label", "class")
    asked = [RequestedOutput(one, {"binary_data": wanted == "binary"}) for one in names] if wanted != "all" else None
    return InferRequest(model, [given], request_id=name, request_outputs=asked)


def plain(result):
    found = {}
    for one in result.outputs:
        values = one.as_numpy().tolist()
        found[one.name] = [value.decode() if isinstance(value, bytes) else value for value in values]
    return {"id": result.id, "model": result.model_name, "outputs": found}


async def main():
    client, infers, errors = InferenceRESTClient(RESTConfig(protocol="v2", retries=0)), {}, {}
    for kind in ("BYTES", "UINT8"):
        for binary in (True, False):
            for wanted in ("all", "binary", "json"):
                for model in (MODEL, f"{MODEL}/versions/{VERSION}"):
                    name = f"{kind} {'binary' if binary else 'json'} to {wanted} {model}"
                    asked = request(kind, model, binary=binary, wanted=wanted, name=name)
                    infers[name] = plain(await client.infer(URL, asked, model_name=model))
    for model in ("none", f"{MODEL}/versions/0"):
        try:
            await client.infer(URL, request("UINT8", model, binary=True, wanted="all", name=""), model_name=model)
        except httpx.HTTPStatusError as error:
            errors[model] = str(error)
    ready = [await client.is_server_live(URL), await client.is_server_ready(URL), await client.is_model_ready(URL, MODEL)]
    ready += [await client.is_model_ready(URL, f"{MODEL}/versions/{VERSION}")]
    unready = [await client.is_model_ready(URL, "none")]
    await client.close()
    json.dump({"ready": ready, "unready": unready, "infers": infers, "errors": errors}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
