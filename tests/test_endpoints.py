"""A new endpoint is a handler and an operation; what the OpenAPI document says of answers is what they hold."""

import base64
import sys
import threading

import httpx2
import numpy as np
import pytest

from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import serving

NEW_ENDPOINTS = '''
import sys

from ebjdat_serve.cli import main
from ebjdat_serve.server.answer import Schema, respond
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import IMAGE_BODY, Endpoint


class Logits(Schema):
    """Logits of each image."""

    results: list[list[float]]
    model: str


def forward(model, image):
    return model.forward(image)[0]


FORWARD = Operation("forward", "classify", forward)


async def logits(service, request):
    """Return the logits of one image or of a list."""
    result = await service.run_on_images(request, FORWARD)
    return respond(Logits(results=result.value.tolist(), model=result.model.name))


ENDPOINTS.append(Endpoint("/logits", logits, Logits, operations=[FORWARD], openapi=IMAGE_BODY))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A server with one endpoint more, started by the script above: LitServe's workers import it too."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "script.py").write_text(NEW_ENDPOINTS, encoding="utf-8")
    command = (sys.executable, str(folder / "script.py"))
    with serving(SHIPPED, folder / "log", "--device", "cpu", "--generate-workers", "0", executable=command) as server:
        yield server


def test_a_new_endpoint_is_a_handler_and_an_operation(extended, picture):
    said = httpx2.post(f"{extended.url}/logits", content=picture).json()
    energies = httpx2.post(f"{extended.url}/energy", content=picture).json()
    np.testing.assert_allclose(said["results"], [[-energy for energy in energies["joint_energy"]]], rtol=1e-5, atol=1e-5)
    assert said["model"] == energies["model"]


def test_it_is_documented_listed_and_refuses_as_the_others(extended):
    document = httpx2.get(f"{extended.url}/openapi.json").json()
    described = document["paths"]["/logits"]["post"]
    assert described["description"] == "Return the logits of one image or of a list."
    assert described["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Logits"}
    assert set(document["components"]["schemas"]["Logits"]["properties"]) == {"results", "model"}
    assert "image/*" in described["requestBody"]["content"]
    assert httpx2.get(f"{extended.url}/").json()["paths"] == ["/classify", "/energy", "/health", "/info", "/logits", "/docs"]
    refused = httpx2.post(f"{extended.url}/logits", content=b"no image")
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    assert httpx2.get(f"{extended.url}/logits").headers["allow"] == "POST"


def test_operations_that_come_at_once_are_not_mixed_up(extended, picture):
    expected = {path: httpx2.post(f"{extended.url}{path}", content=picture).json() for path in ("/logits", "/energy", "/classify")}
    wrong = []

    def ask(path):
        for _ in range(10):
            said = httpx2.post(f"{extended.url}{path}", content=picture, timeout=30).json()
            numbers, known = (one["results"][0] if path == "/logits" else [one["energy"]] for one in (said, expected[path]))
            if said.keys() != expected[path].keys() or not np.allclose(numbers, known, atol=1e-4):
                wrong.append((path, said))

    threads = [threading.Thread(target=ask, args=(path,)) for path in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# answers and their document ------------------------------------------------------------------------------------------


def check(value, schema, components):
    """Assert that a JSON value has the keys that its schema has, and those that it requires, at every depth."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        fitting = []
        for option in schema["anyOf"]:
            try:
                check(value, option, components)
            except AssertionError:
                continue
            fitting.append(option)
        assert fitting, (value, schema)
        return
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    assert isinstance(value, kinds[schema["type"]] if "type" in schema else object), (value, schema)
    if schema.get("type") == "array":
        for item in value:
            check(item, schema["items"], components)
    for name, one in value.items() if "properties" in schema else ():
        assert name in schema["properties"], name
        check(one, schema["properties"][name], components)
    assert set(schema.get("required", ())) <= set(value if isinstance(value, dict) else ()), schema


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("POST", "/classify", {}),
        ("POST", "/energy", {}),
        ("GET", "/generate", {"class": 3, "steps": 2, "n": 2, "format": "json"}),
        ("GET", "/health", {}),
        ("GET", "/info", {}),
    ],
)
def test_an_answer_holds_what_the_document_says(live, picture, method, path, query):
    document = httpx2.get(f"{live.url}/openapi.json").json()
    schema = document["paths"][path][method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
    bodies = [{}] if method == "GET" else [{"content": picture}, {"json": {"images": [base64.b64encode(picture).decode()] * 2}}]
    for body in bodies:
        answer = httpx2.request(method, f"{live.url}{path}", params=query, timeout=60, **body)
        assert answer.status_code == 200
        check(answer.json(), schema, document["components"]["schemas"])


def test_the_headers_of_a_png_are_those_of_the_document(live):
    document = httpx2.get(f"{live.url}/openapi.json").json()
    answer = httpx2.get(f"{live.url}/generate", params={"class": 3, "steps": 2})
    said = {name for name in answer.headers if name.startswith("x-")} - {"x-content-type-options", "x-frame-options"}
    assert said == {name.lower() for name in document["paths"]["/generate"]["get"]["responses"]["200"]["headers"]}


def test_an_error_holds_what_the_document_says(live):
    document = httpx2.get(f"{live.url}/openapi.json").json()
    refused = httpx2.post(f"{live.url}/classify", json={"images": ["%%%"]})
    schema = document["paths"]["/classify"]["post"]["responses"]["422"]["content"]["application/problem+json"]["schema"]
    check(refused.json(), schema, document["components"]["schemas"])
    assert refused.json()["index"] == 0
