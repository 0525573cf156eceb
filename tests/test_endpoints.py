"""Tests that a new endpoint takes a handler and an operation, and that responses match the OpenAPI document."""

import base64
import sys
import threading

import httpx2
import numpy as np
import pytest

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.app import operations_of
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import Endpoint
from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import serving

NEW_ENDPOINTS = '''
import sys

from fastapi import Response

from ebjdat_serve.cli import main
from ebjdat_serve.server.answer import Schema, respond
from ebjdat_serve.server.compute.model import Operation
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import IMAGE_BODY, Endpoint
from ebjdat_serve.server.queues.request_queue import PendingRequest
from ebjdat_serve.server.read.generate_request import validate


class Outputs(Schema):
    """Outputs of the network for each image."""

    results: list[list[float]]
    model: str


def run_forward(model, image):
    return model.forward(image).logits


FORWARD = Operation("forward", "classify", run_forward)
UNLISTED = Operation("unlisted", "classify", run_forward)
UNLISTED_CHAINS = Operation("unlisted-chains", "generate", run_forward)


async def forward(service, request):
    """Return the outputs of the network for one image or a list."""
    result = await service.run_on_images(request, FORWARD)
    return respond(Outputs(results=result.value.tolist(), model=result.model.name))


async def labels(service, request):
    """Return the labels of the classes."""
    return Response("\\n".join(service.manager.active.labels), media_type="text/plain")


async def unlisted(service, request):
    """Ask for an operation that the endpoint does not list."""
    return respond((await service.run_on_images(request, UNLISTED)).value)


async def unlisted_chains(service, request):
    """Ask for an operation on chains that the endpoint does not list."""
    model, queue = service.manager.active, service.generate_queue
    job = validate({"class": "cat", "n": "1", "steps": "2"}, model.bundle.manifest, service.settings).job
    client = request.scope["client_name"]
    with queue.slot(model.key, client) as deadline:
        return respond(await queue.submit(PendingRequest(model.key, UNLISTED_CHAINS.name, job, request, client, deadline)))


ENDPOINTS += [
    Endpoint("/forward", forward, Outputs, operations=[FORWARD], openapi=IMAGE_BODY),
    Endpoint("/labels", labels, method="GET", scopes=(), responses={}),
    Endpoint("/unlisted", unlisted, hidden=True),
    Endpoint("/unlisted-chains", unlisted_chains, hidden=True),
]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


KEY = "secret"


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A server with more endpoints and a key, started by the script above: LitServe's workers import it too."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "script.py").write_text(NEW_ENDPOINTS, encoding="utf-8")
    command = ("env", f"LIT_SERVER_API_KEY={KEY}", sys.executable, str(folder / "script.py"))
    with serving(SHIPPED, folder / "log", "--device", "cpu", executable=command) as server:
        yield server


@pytest.fixture(scope="module")
def client(extended):
    with httpx2.Client(base_url=extended.url, headers={"X-API-Key": KEY}, timeout=30) as client:
        yield client


def test_a_new_endpoint_is_a_handler_an_operation_and_an_entry(client, picture):
    said = client.post("/forward", content=picture).json()
    energies = client.post("/energy", content=picture).json()
    np.testing.assert_allclose(said["results"], [[-energy for energy in energies["joint_energy"]]], rtol=1e-5, atol=1e-5)
    assert said["model"] == energies["model"]


def test_it_is_documented_listed_and_refuses_as_the_others(client):
    document = client.get("/openapi.json").json()
    described = document["paths"]["/forward"]["post"]
    assert described["description"] == "Return the outputs of the network for one image or a list."
    assert described["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Outputs"}
    assert set(document["components"]["schemas"]["Outputs"]["properties"]) == {"results", "model"}
    assert "image/*" in described["requestBody"]["content"]
    known = dict.fromkeys(one.example or one.path for one in ENDPOINTS if not one.hidden)
    assert client.get("/").json()["paths"] == [*known, "/forward", "/labels", "/docs"]
    refused = client.post("/forward", content=b"no image")
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    assert client.get("/forward").headers["allow"] == "POST"


def test_a_new_endpoint_answers_head_and_needs_no_key_as_it_says(extended, client):
    bare = f"{extended.url}/labels"
    assert httpx2.get(bare).text.splitlines()[3] == "cat"
    assert (httpx2.head(bare).status_code, httpx2.head(bare).content) == (200, b"")
    assert httpx2.post(f"{extended.url}/forward").status_code == 401
    assert client.head("/forward").status_code == 405
    assert client.head("/generate", params={"class": 3}).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind", "operation"), [("/unlisted", "classify", "unlisted"), ("/unlisted-chains", "generate", "unlisted-chains")]
)
def test_an_operation_that_no_endpoint_lists_is_an_error_and_ends_no_worker(extended, client, picture, path, kind, operation):
    workers = extended.children()
    refused = client.post(path, content=picture)
    assert (refused.status_code, refused.headers["content-type"]) == (500, "application/problem+json")
    assert refused.json()["detail"] == f"no {kind} worker has the operation {operation!r}: list it in the endpoint's operations"
    assert client.post("/classify", content=picture).status_code == 200
    assert client.get("/generate", params={"class": 3, "steps": 1}).status_code == 200
    assert extended.children() == workers
    load = client.get("/info").json()["load"]
    assert (load["generate"]["chains"], load["generate"]["requests"]) == (0, 0)


def test_operations_that_come_at_once_are_not_mixed_up(client, picture):
    expected = {path: client.post(path, content=picture).json() for path in ("/forward", "/energy", "/classify")}
    wrong = []

    def ask(path):
        for _ in range(10):
            said = client.post(path, content=picture).json()
            numbers, known = (one["results"][0] if path == "/forward" else [one["energy"]] for one in (said, expected[path]))
            if said.keys() != expected[path].keys() or not np.allclose(numbers, known, atol=1e-4):
                wrong.append((path, said))

    threads = [threading.Thread(target=ask, args=(path,)) for path in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_path_with_parameters_is_refused():
    """Scopes of keys are looked up by path: such an endpoint would be closed to every key, whatever its scopes say."""
    with pytest.raises(ValueError, match=r"/x/\{id\}: scopes of keys go by paths"):
        Endpoint("/x/{id}", lambda service, request: None, scopes=())


def test_two_operations_of_one_name_are_refused():
    same = [Endpoint(path, None, operations=[Operation("sum", "classify", max)]) for path in ("/a", "/b")]
    assert [operation.name for operation in operations_of(same)] == ["sum"]
    with pytest.raises(ValueError, match="two operations are named 'sum'"):
        operations_of([*same, Endpoint("/c", None, operations=[Operation("sum", "classify", min)])])


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
    said = {name for name in answer.headers if name.startswith("x-")} - {"x-content-type-options", "x-frame-options", "x-request-id"}
    assert said == {name.lower() for name in document["paths"]["/generate"]["get"]["responses"]["200"]["headers"]}


def test_an_error_holds_what_the_document_says(live):
    document = httpx2.get(f"{live.url}/openapi.json").json()
    refused = httpx2.post(f"{live.url}/classify", json={"images": ["%%%"]})
    schema = document["paths"]["/classify"]["post"]["responses"]["422"]["content"]["application/problem+json"]["schema"]
    check(refused.json(), schema, document["components"]["schemas"])
    assert refused.json()["index"] == 0


def test_the_open_protocol_asks_for_the_key_in_its_own_words(extended, client, picture):
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(picture).decode()]}
    for send in (httpx2, client):
        base = extended.url if send is httpx2 else ""
        answers = [send.get(f"{base}{path}") for path in ("/v2", "/v2/models", "/v2/models/cifar10-small", "/v2/models/stats", "/v2/x")]
        answers.append(send.post(f"{base}/v2/models/cifar10-small/infer", json={"inputs": [image]}))
        assert [one.status_code for one in answers] == ([401] * 6 if send is httpx2 else [200, 200, 200, 200, 404, 200])
        assert {one.headers["content-type"] for one in answers} == {"application/json"}
        if send is httpx2:
            assert all(list(one.json()) == ["error"] and "www-authenticate" in one.headers for one in answers)
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/cifar10-small/ready"):
            assert send.get(f"{base}{path}").status_code == 200
        for path in ("/v2/ready", "/v2/health/ready", "/v2/models/cifar10-small/versions/0/ready", "/v2/models/x/ready"):
            said = send.get(f"{base}{path}").text  # probes need no key, and tell only what they were told
            assert Bundle.load(SHIPPED).manifest.version not in said
            assert ("cifar10" in said) == ("cifar10" in path)
