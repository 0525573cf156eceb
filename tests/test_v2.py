"""The Open Inference Protocol v2 from a running server, against what /classify and /energy say of the same images."""

import base64
import gzip
import json
import threading
import zlib

import numpy as np
import pytest

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server.application import Application
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.endpoints.endpoint import Shared
from ebjdat_serve.server.read.auth import Access
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.server.v2_protocol import HEADER_LENGTH
from tests.classifiers import images
from tests.conftest import HTTP
from tests.test_v2_bodies import binary, document, elements, tensor, unpacked

MODEL = Bundle.load(SHIPPED).manifest
NAMED = f"/v2/models/{MODEL.name}"
PATHS = (NAMED, f"{NAMED}/versions/{MODEL.version}")
PIXELS = images(3, (50, 41), 5)
FILES = [encode_png(one) for one in PIXELS]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def expected(live):
    """What the server's own endpoints say of the images."""
    sent = {"images": [base64.b64encode(one).decode() for one in FILES]}
    said = [HTTP.post(f"{live.url}/{path}", json=sent).json()["results"] for path in ("classify", "energy")]
    return [{**energy, **row} for row, energy in zip(*said, strict=True)]


def agree(found, expected):
    for name in ("energy", "suspicion", "p_value"):
        assert found[name] == pytest.approx([row[name] for row in expected], rel=1e-5), name
    assert found["logits"] == pytest.approx(-np.array([row["joint_energy"] for row in expected]), rel=1e-5)
    assert found["probabilities"].argmax(1).tolist() == found["class"].tolist() == [row["class"] for row in expected]
    assert found["probabilities"].max(1) == pytest.approx([row["probability"] for row in expected], rel=1e-5)
    assert found["suspicious"].tolist() == [row["suspicious"] for row in expected]
    assert found["label"].tolist() == [row["label"] for row in expected]


def bodies():
    files = {"shape": [3], "datatype": "BYTES", "name": "image"}
    array = {"shape": list(PIXELS.shape), "datatype": "UINT8", "name": "image"}
    for given, values, data in (
        (files, [base64.b64encode(one).decode() for one in FILES], elements(FILES)),
        (array, PIXELS.tolist(), PIXELS.tobytes()),
    ):
        everything = {"id": "7", "parameters": {"binary_data_output": True, "unknown": 1}}
        yield json.dumps(document({**given, "data": values}, **everything)).encode(), {}
        yield binary(document({**given, "parameters": {"binary_data_size": len(data)}}, **everything), data)


@pytest.mark.parametrize("path", PATHS)
def test_files_and_arrays_in_every_form_are_answered_as_by_classify(live, expected, path):
    for body, headers in bodies():
        for encoding, pack in (("identity", bytes), ("gzip", gzip.compress), ("deflate", zlib.compress)):
            sent = {**headers, "Content-Encoding": encoding, "Accept-Encoding": encoding}
            answer = HTTP.post(f"{live.url}{path}/infer", content=pack(body), headers=sent)
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "application/octet-stream"
            said, found = unpacked(answer.content, int(answer.headers[HEADER_LENGTH]))
            assert (said["id"], said["model_name"], said["model_version"]) == ("7", MODEL.name, MODEL.version)
            agree(found, expected)


def test_json_answers_hold_all_and_outputs_are_told_one_by_one(live, expected):
    sent = document(tensor(shape=[3], data=[base64.b64encode(one).decode() for one in FILES]))
    answer = HTTP.post(f"{live.url}{NAMED}/infer", json=sent)
    assert (answer.headers["content-type"], HEADER_LENGTH in answer.headers) == ("application/json", False)
    said, found = unpacked(answer.content, len(answer.content))
    assert "id" not in said
    agree(found, expected)
    for encoding in ("gzip", "deflate"):
        again = HTTP.post(f"{live.url}{NAMED}/infer", json=sent, headers={"Accept-Encoding": encoding})
        assert again.headers["content-encoding"] == encoding
        assert again.content == answer.content
    outputs = [{"name": "class", "parameters": {"binary_data": True}}, {"name": "label"}]
    mixed = HTTP.post(f"{live.url}{NAMED}/infer", json={**sent, "outputs": outputs})
    _, found = unpacked(mixed.content, int(mixed.headers[HEADER_LENGTH]))
    assert list(found) == ["class", "label"]
    assert found["label"].tolist() == [row["label"] for row in expected]


def test_requests_are_counted_by_image_batch_and_code(live):
    stats = f"{live.url}{NAMED}/stats"
    before = HTTP.get(stats).json()["model_stats"][0]
    array = {"name": "image", "shape": list(PIXELS.shape), "datatype": "UINT8", "data": PIXELS.ravel().tolist()}
    HTTP.post(f"{live.url}{NAMED}/infer", json=document(array))
    HTTP.post(f"{live.url}{NAMED}/infer", content=b"{}")
    after = HTTP.get(stats).json()["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["execution_count"] > before["execution_count"]
    for name, more in (("success", 1), ("fail", 1), ("compute_input", 1)):
        assert after["inference_stats"][name]["count"] == before["inference_stats"][name]["count"] + more, name
    assert HTTP.get(f"{live.url}/v2/models/stats").json()["model_stats"][0]["inference_count"] == after["inference_count"]
    text = HTTP.get(f"{live.url}/metrics").text
    assert f'ebjdat_requests_total{{code="400",model="{MODEL.name}",route="/v2/infer",version="{MODEL.version}"}}' in text


def test_the_server_and_its_models_are_described(live):
    get = {path: HTTP.get(f"{live.url}{path}").json() for path in ("/v2", "/v2/models", *PATHS, f"{NAMED}/config")}
    assert (get["/v2"]["name"], "binary_tensor_data" in get["/v2"]["extensions"]) == ("ebjdat_serve", True)
    assert get["/v2/models"] == {"models": [MODEL.name]}
    about = get[PATHS[0]]
    assert about == get[PATHS[1]]
    assert (about["name"], about["versions"]) == (MODEL.name, [MODEL.version])
    outputs = {one["name"]: (one["datatype"], one["shape"]) for one in about["outputs"]}
    assert outputs["logits"] == ("FP32", [-1, 10])
    assert outputs["label"] == ("BYTES", [-1])
    assert [one["name"] for one in get[f"{NAMED}/config"]["output"]] == list(outputs)
    row = {"name": MODEL.name, "version": MODEL.version, "state": "READY", "reason": ""}
    for body in (b"", b"{}", b'{"ready": true}'):
        assert HTTP.post(f"{live.url}/v2/repository/index", content=body).json() == [row]
    for path in ("/v2/health/ready", f"{PATHS[0]}/ready", f"{PATHS[1]}/ready"):
        answer = HTTP.get(f"{live.url}{path}")
        assert answer.status_code == 200
        assert answer.json()["ready"] is answer.json()["live"] is True
        assert HTTP.head(f"{live.url}{path}").status_code == 200
    assert HTTP.get(f"{live.url}/v2/health/live").json() == {"live": True}


ERRORS = [
    ("GET", "/v2/none", b"", {}, 404, "no such path"),
    ("GET", "/v2/models/none", b"", {}, 404, "no model here is named none"),
    ("POST", "/v2/models/none/infer", b"{}", {}, 404, "no model here is named none"),
    ("GET", f"{NAMED}/versions/0", b"", {}, 404, f"is served in version {MODEL.version}"),
    ("GET", f"{NAMED}/versions/0/ready", b"", {}, 404, f"that version of {MODEL.name} is not served"),
    ("POST", f"{NAMED}/versions/0/infer", b"{}", {}, 404, f"is served in version {MODEL.version}"),
    ("GET", f"{NAMED}/infer", b"", {}, 405, "use POST"),
    ("POST", f"{NAMED}/infer", b"{}", {}, 400, "one input"),
    ("POST", f"{NAMED}/infer", b"{}", {"Content-Encoding": "br"}, 415, "gzip"),
    ("POST", f"{NAMED}/infer", json.dumps(document(tensor(datatype="\ud800"))).encode(), {}, 400, r"not \ud800"),
    ("POST", f"{NAMED}/infer", json.dumps(document(outputs=[{"name": "\udfff", "parameters": 1}])).encode(), {}, 400, r"output \udfff"),
    ("POST", f"{NAMED}/infer", bytes(23 * 2**20), {}, 413, "limit of"),
    ("POST", f"{NAMED}/infer", gzip.compress(bytes(40 * 2**20)), {"Content-Encoding": "gzip"}, 413, "limit of"),
    ("POST", f"{NAMED}/infer", json.dumps(document(tensor(data=["AAAA"]))).encode(), {}, 400, "images[0]: not an image"),
    ("POST", f"{NAMED}/infer", json.dumps(document(outputs=[{"name": "x"}])).encode(), {}, 400, "no output 'x'"),
    ("POST", f"{NAMED}/infer", b"{}", {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403, "pages of"),
    ("POST", "/v2/repository/index", b"[]", {}, 400, "ready"),
    ("POST", "/v2/repository/index", bytes(5000), {}, 413, "limit of"),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "said"), ERRORS)
def test_errors_are_json_with_one_sentence(live, method, path, body, headers, status, said):
    answer = HTTP.request(method, f"{live.url}{path}", content=body, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert list(answer.json()) == ["error"]
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_other_paths_keep_their_problem_documents(live):
    for path in ("/v20", "/none"):
        assert HTTP.get(f"{live.url}{path}").headers["content-type"] == "application/problem+json"


def test_many_at_a_time_get_their_own_answers(live):
    wrong = []

    def ask(i):
        array = {"name": "image", "shape": [1, *PIXELS.shape[1:]], "datatype": "UINT8", "data": PIXELS[i % 3].ravel().tolist()}
        said = HTTP.post(f"{live.url}{NAMED}/infer", json=document(array, id=str(i), outputs=[{"name": "logits"}])).json()
        wrong.append((said["id"] != str(i), i % 3, said["outputs"][0]["data"]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 12
    assert not any(one for one, _, _ in wrong)
    for i in range(3):
        first, *rest = [logits for _, which, logits in wrong if which == i]
        for other in rest:
            assert other == pytest.approx(first, rel=1e-4)


def test_keys_scopes_go_by_the_plain_paths():
    settings = Settings()
    scopes = Application(Shared(settings, Access.of(settings), ENDPOINTS)).scopes()
    assert scopes["/v2/infer"] == {"classify"}
    for path in ("/v2", "/v2/models", "/v2/model", "/v2/config", "/v2/repository/index"):
        assert scopes[path] == {"classify", "operate"}
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/ready"):
        assert scopes[path] == set()
    assert scopes["/v2/stats"] == scopes["/v2/models/stats"] == {"operate"}
