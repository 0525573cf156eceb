"""Tests of the live server over HTTP: its responses, and that bad input does not affect other requests."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import unicodedata
import urllib.parse

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from ebjdat_serve import pixels, strict_json
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.keys import digest, environment_key
from ebjdat_serve.pixels import decode, encode_png, to_unit
from ebjdat_serve.reach import Policy
from ebjdat_serve.server.app import build_server
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.generate_request import GenerateQuery, check_limits, find_label, read_values
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.view_files import load_reviewed
from ebjdat_serve.views import Seen
from tests.conftest import ROOT, serving
from tests.test_pixels import bomb

LIMITS = Settings()


def post(live, path, **request):
    return httpx2.post(f"{live.url}{path}", timeout=60, **request)


def raw(live, path, data, kind="application/octet-stream"):
    return post(live, path, content=data, headers={"Content-Type": kind})


# what it answers ---------------------------------------------------------------------------------------------------


def test_classify_says_everything_it_promises(live, shipped, picture):
    said = raw(live, "/classify", picture).json()
    flag = {"energy", "suspicion", "p_value", "suspicious", "why", "margin", "margin_p_value", "decision", "reasons"}
    assert set(said) == {"class", "label", "probability", *flag, "top", "alpha", "model"}
    assert said["label"] == shipped.manifest.labels[said["class"]]
    assert len(said["top"]) == 5
    assert said["top"][0] == {name: said[name] for name in ("class", "label", "probability")}
    assert [c["probability"] for c in said["top"]] == sorted((c["probability"] for c in said["top"]), reverse=True)
    assert said["suspicious"] == (said["p_value"] < said["alpha"])
    assert said["model"] == f"{shipped.manifest.name}@{shipped.manifest.version}"


def test_energy_is_the_logsumexp_of_the_joint_energies(live, shipped, picture):
    said = raw(live, "/energy", picture).json()
    joint = np.array(said["joint_energy"])
    assert len(joint) == len(shipped.manifest.labels)
    assert said["energy"] == pytest.approx(-np.logaddexp.reduce(-joint), abs=1e-4)
    classified = raw(live, "/classify", picture).json()
    assert said["energy"] == pytest.approx(classified["energy"], abs=1e-5)
    assert (said["suspicion"], said["p_value"]) == (classified["suspicion"], classified["p_value"])
    calibration, combination = shipped.calibration(), shipped.combination()
    image = to_unit(decode(picture, Input(32, 32))[None])
    terms = combination.terms(Seen(image, load_engine(shipped, "onnx", "cpu").classify(image).features, -joint[None].astype(np.float32)))
    assert said["suspicion"] == pytest.approx(float(terms.sum()), abs=0.02)  # rounding may pass one clean score
    assert said["why"] == classified["why"] == combination.why(terms)[0]
    assert said["p_value"] == (1 + sum(score >= said["suspicion"] for score in calibration.scores)) / (len(calibration.scores) + 1)
    info = httpx2.get(f"{live.url}/info").json()["calibration"]
    assert (info["views"], info["left_out"], info["handled"]) == (calibration.views, {}, 0.5)


def test_the_margin_ranks_and_the_decision_follows_from_both_questions(live, shipped, picture, test_images):
    reviewed = load_reviewed(shipped.path / "views.safetensors", "fp32", ["ood", "margin"])
    policy = Policy.calibrated({name: scores.astype(np.float64) for name, scores in reviewed.items()}, 0.05)
    images = [picture, *(encode_png(image) for image in test_images[0][:24]), encode_png(np.full((32, 32, 3), 255, np.uint8))]
    several = {"images": [base64.b64encode(one).decode() for one in images]}
    answers, joint = (post(live, path, json=several).json()["results"] for path in ("/classify", "/energy"))
    for said, energies in zip(answers, joint, strict=True):
        first, second = sorted(energies["joint_energy"])[:2]
        assert said["margin"] == pytest.approx(second - first, abs=1e-5)
        clean = -reviewed["margin"]
        assert said["margin_p_value"] == pytest.approx((1 + (clean <= said["margin"]).sum()) / (len(clean) + 1), abs=1e-3)
        reasons = [name for name, p in (("ood", said["p_value"]), ("margin", said["margin_p_value"])) if p <= policy.levels[name]]
        assert (said["reasons"], said["decision"]) == (reasons, "review" if reasons else "accept")
    assert answers[-1]["reasons"][0] == "ood"
    assert {said["decision"] for said in answers} == {"accept", "review"}
    info = httpx2.get(f"{live.url}/info").json()["calibration"]
    assert (info["reviewed"], info["review_share"]) == (["ood", "margin"], pytest.approx(125 / 2501))


def test_what_a_new_user_tries_first_is_suspicious_for_what_it_looks_like(live):
    """A white square had a p-value of .997."""
    white, noise = np.full((32, 32, 3), 255, np.uint8), np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((4, 4)))[..., None].repeat(3, axis=2).astype(np.uint8) * 255
    for image in (white, 255 - white, noise, board):
        said = raw(live, "/classify", encode_png(image)).json()
        assert said["suspicious"], said
        assert said["why"] == "statistics"


@pytest.mark.parametrize("path", ["/classify", "/energy"])
def test_every_way_to_send_a_picture_gives_the_same_answer(live, picture, path):
    encoded = base64.b64encode(picture).decode()
    answers = [
        raw(live, path, picture),
        raw(live, path, picture, "application/x-www-form-urlencoded"),
        raw(live, path, picture, "image/png"),
        post(live, path, files={"image": ("cat.png", picture, "image/png")}),
        post(live, path, json={"image": encoded}),
        post(live, path, json={"image": f"data:image/png;base64,{encoded}"}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    energies = [answer.json()["energy"] for answer in answers]
    assert max(energies) - min(energies) < 1e-5
    listed = post(live, path, json={"images": [encoded, encoded]}).json()
    assert [r["energy"] for r in listed["results"]] == pytest.approx([energies[0]] * 2, abs=1e-5)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("WEBP", "RGB")])
def test_pictures_of_any_kind_and_size(live, kind, mode):
    array = np.random.default_rng(0).integers(0, 256, (123, 77, 3), dtype=np.uint8)
    picture = Image.fromarray(array[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(array).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    assert raw(live, "/classify", buffer.getvalue()).status_code == 200


def test_generate_draws_a_marked_png_of_the_class_asked_for(live, shipped):
    answer = httpx2.get(f"{live.url}/generate", params={"class": 3, "seed": 5}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    size = shipped.manifest.input
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (size.width, size.height)
        assert pixels.AI_ORIGIN in picture.info["XML:com.adobe.xmp"]
    assert answer.headers["x-label"] == shipped.manifest.labels[3]
    assert answer.headers["x-seed"] == "5"
    assert 0 <= float(answer.headers["x-probability"]) <= 1
    # what the headers say is what the server says of the very same image
    again = raw(live, "/classify", answer.content).json()
    assert again["energy"] == pytest.approx(float(answer.headers["x-energy"]), abs=1e-3)


def test_generate_by_name_index_get_and_post_is_one_thing(live, shipped):
    name = shipped.manifest.labels[3]
    wanted = {"seed": 11, "steps": 5}
    url = f"{live.url}/generate"
    answers = [
        httpx2.get(url, params={"class": 3, **wanted}),
        httpx2.get(url, params={"class": name, **wanted}),
        httpx2.get(url, params={"class": name.upper(), **wanted}),
        httpx2.post(url, params={"class": 3, **wanted}),
        httpx2.post(url, json={"class": 3, **wanted}),
        httpx2.post(url, json={"class": name, **wanted}),
        httpx2.post(url, data={"class": name, **wanted}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 7, [answer.text for answer in answers if answer.status_code != 200]
    assert len({answer.content for answer in answers}) == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_class_is_found_by_its_name_in_either_normal_form(form, asked):
    names = [unicodedata.normalize(form, name) for name in ("Ångström", "Käfer", "käse", "Käse")]
    for index, name in enumerate(names):
        query = urllib.parse.urlencode({"class": unicodedata.normalize(asked, name)})
        request = Request({"type": "http", "method": "GET", "query_string": query.encode(), "headers": []})
        values = asyncio.run(read_values(request, LIMITS))
        assert find_label(values["class"], names) == index
    assert find_label(unicodedata.normalize(asked, "KÄFER"), names) == 1
    assert find_label("2", names) == find_label(2, names) == 2
    for wrong in ("kafer", "4", 4):
        with pytest.raises(Problem, match="unknown"):
            find_label(wrong, names)
    with pytest.raises(Problem, match="200 characters"):
        find_label("\u0315\u0316" * 101, names)


def test_generate_as_json_and_as_a_grid_hold_the_same_images(live, shipped):
    wanted = {"class": 1, "n": 3, "seed": 2, "steps": 4}
    said = httpx2.get(f"{live.url}/generate", params={**wanted, "format": "json"}).json()
    sheet = httpx2.get(f"{live.url}/generate", params={**wanted, "scale": 2})
    size = shipped.manifest.input
    with Image.open(io.BytesIO(sheet.content)) as picture:
        assert picture.size == (2 * 2 * size.width, 2 * 2 * size.height)
        grid = np.asarray(picture)
    assert [one["seed"] for one in said["images"]] == [2, 3, 4]
    for i, one in enumerate(said["images"]):
        assert one["class"] == 1
        with Image.open(io.BytesIO(base64.b64decode(one["png"]))) as picture:
            row, column = divmod(i, 2)
            tile = grid[
                row * 2 * size.height : (row + 1) * 2 * size.height : 2, column * 2 * size.width : (column + 1) * 2 * size.width : 2
            ]
            np.testing.assert_array_equal(np.asarray(picture), tile)


def test_a_seed_draws_the_same_picture_and_another_seed_another(live):
    def draw(seed):
        return httpx2.get(f"{live.url}/generate", params={"class": 0, "seed": seed, "steps": 3}).content

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_health_info_docs_and_index(live, shipped):
    assert httpx2.get(f"{live.url}/health").json() == {"status": "ok"}
    info = httpx2.get(f"{live.url}/info").json()
    assert info["engine"] == "onnx"
    assert info["provider"] == "CPUExecutionProvider"
    assert info["labels"] == shipped.manifest.labels
    assert info["calibration"]["of"] == shipped.manifest.files["classify.onnx"].sha256
    assert "swagger" in httpx2.get(f"{live.url}/docs").text.lower()
    paths = httpx2.get(f"{live.url}/openapi.json").json()["paths"]
    assert {"/classify", "/energy", "/generate", "/health", "/info"} <= set(paths)
    assert "/generate?class=3" in httpx2.get(f"{live.url}/").json()["paths"]


# what it refuses ---------------------------------------------------------------------------------------------------

GOOD = pixels.encode_png(np.zeros((8, 8, 3), np.uint8))
B64 = base64.b64encode(GOOD).decode()
JSON = {"Content-Type": "application/json"}

BAD_BODIES = [
    ("not an image", {"content": b"hello", "headers": {"Content-Type": "image/png"}}, 422, "send PNG, JPEG, WEBP"),
    ("gif", {"content": b"GIF89a" + bytes(50)}, 422, "damaged"),
    (
        "truncated",
        {"content": pixels.encode_png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))[:500]},
        422,
        "truncated",
    ),
    ("bomb", {"content": bomb(30_000, 30_000)}, 413, "25000000"),
    ("empty", {"content": b""}, 422, "0 bytes"),
    ("50 MB", {"content": bytes(50 * 2**20)}, 413, str(LIMITS.max_body)),
    ("too large an image", {"content": bytes(Limits.max_bytes + 1)}, 413, str(Limits.max_bytes)),
    ("content type", {"content": GOOD, "headers": {"Content-Type": "text/plain"}}, 415, "multipart/form-data"),
    ("pdf", {"content": b"%PDF", "headers": {"Content-Type": "application/pdf"}}, 415, "application/json"),
    ("bad json", {"content": b"{", "headers": JSON}, 400, "not valid JSON"),
    ("NaN", {"content": b'{"image": NaN}', "headers": JSON}, 400, "NaN is not JSON"),
    ("deep json", {"content": b"[" * 100_000, "headers": JSON}, 422, "nothing nested"),
    ("json bomb", {"content": b'{"images":[' + b"[]," * 5_000_000 + b"[]]}", "headers": JSON}, 422, "nothing nested"),
    ("gzip", {"content": GOOD, "headers": {"Content-Encoding": "gzip"}}, 415, "gzip"),
    ("many pixels", {"json": {"images": [base64.b64encode(bomb(4_000, 4_000)).decode()] * 2}}, 413, "one by one"),
    ("not utf-8", {"content": b'{"image": "\xff"}', "headers": JSON}, 400, "not valid JSON"),
    ("json list", {"json": [1]}, 422, "images"),
    ("no key", {"json": {}}, 422, "images"),
    ("extra key", {"json": {"image": B64, "colour": 1}}, 422, "no other key"),
    ("number", {"json": {"image": 3}}, 422, "base64 string"),
    ("not base64", {"json": {"image": "%%%"}}, 422, "not base64"),
    ("empty list", {"json": {"images": []}}, 422, "1 to 64"),
    ("long list", {"json": {"images": [B64] * 65}}, 422, "1 to 64"),
    ("wrong field", {"files": {"file": ("a.png", GOOD)}}, 422, "-F image=@"),
    ("two fields", {"files": [("image", ("a.png", GOOD)), ("image", ("b.png", GOOD))]}, 422, "exactly one"),
    ("text field", {"data": {"image": "hello"}, "files": {}}, 422, "PNG, JPEG"),
    ("text of a form", {"files": {"image": (None, "hello")}}, 422, "holds text"),
    ("text beside a file", {"data": {"note": "hello"}, "files": {"image": ("a.png", GOOD)}}, 422, "holds text"),
    ("broken form", {"content": b"hello", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "multipart"),
    ("no boundary", {"content": b"hello", "headers": {"Content-Type": "multipart/form-data"}}, 400, "multipart"),
]


def clean(answer):
    text = answer.text
    assert "Traceback" not in text
    assert "site-packages" not in text
    assert answer.headers["content-type"] == "application/problem+json"
    said = json.loads(text)
    assert said["status"] == answer.status_code
    return said["detail"]


@pytest.mark.parametrize("path", ["/classify", "/energy"])
@pytest.mark.parametrize(("request_", "status", "said"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES])
def test_a_bad_body_is_refused_with_the_limit_or_the_fix(live, path, request_, status, said):
    answer = post(live, path, **request_)
    assert answer.status_code == status, answer.text
    assert said in clean(answer)


def test_line_wrapped_base64_is_base64(live, picture):
    assert post(live, "/classify", json={"image": base64.encodebytes(picture).decode()}).status_code == 200


def test_endless_headers_are_cut_off(live):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        sent, line = 0, b"X-A: " + b"a" * 1000 + b"\r\n"
        with contextlib.suppress(OSError):
            while sent < 20 * 2**20:
                client.sendall(line)
                sent += len(line)
            assert not client.recv(1)
    assert sent < 10 * 2**20
    assert httpx2.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize("bad", ["aGVsbG8=", "%%%", 7, None])
def test_a_bad_item_names_its_index_and_nothing_is_computed(live, bad):
    answer = post(live, "/classify", json={"images": [B64, B64, bad, B64]})
    assert answer.status_code == 422
    assert "images[2]" in clean(answer)
    assert answer.json()["index"] == 2
    assert "results" not in answer.json()


BAD_QUERIES = [
    ({}, "class is missing"),
    ({"class": "99"}, "0 to 9"),
    ({"class": "-1"}, "0 to 9"),
    ({"class": "catt"}, "unknown"),
    ({"class": ""}, "unknown"),
    ({"class": "3.5"}, "unknown"),
    ({"class": "٣"}, "unknown"),
    ({"class": "3", "n": "0"}, "1 to 64"),
    ({"class": "3", "n": "1000000"}, "1 to 64"),
    ({"class": "3", "n": "x"}, "integer"),
    ({"class": "3", "steps": "-1"}, "1 to 1000"),
    ({"class": "3", "steps": "0"}, "1 to 1000"),
    ({"class": "3", "steps": "1e9"}, "integer"),
    ({"class": "3", "steps": "1001"}, "1 to 1000"),
    ({"class": "3", "step_size": "0"}, "step_size"),
    ({"class": "3", "step_size": "nan"}, "step_size"),
    ({"class": "3", "step_size": "inf"}, "step_size"),
    ({"class": "3", "temperature": "-1"}, "temperature"),
    ({"class": "3", "temperature": "nan"}, "temperature"),
    ({"class": "3", "every": "0", "stream": "true"}, "every"),
    ({"class": "3", "every": "5"}, "stream=true"),
    ({"class": "3", "stream": "maybe"}, "stream"),
    ({"class": "3", "seed": "-1"}, "seed"),
    ({"class": "3", "seed": "99999999999999999999"}, "seed"),
    ({"class": "3", "scale": "0"}, "1 to 16"),
    ({"class": "3", "scale": "1000"}, "1 to 16"),
    ({"class": "3", "format": "gif"}, "png"),
    ({"class": "3", "colour": "red"}, "known are class, n, steps"),
]


def test_steps_beyond_those_that_the_sampler_was_tuned_for_name_the_option_that_allows_them(shipped):
    query = GenerateQuery(**{"class": 3})
    tuned = shipped.manifest.sampler.steps
    check_limits(query, tuned, shipped.manifest, Settings())
    with pytest.raises(Problem, match=rf"1 to {tuned}, the number that its .* \(serve --max-steps raises it\), not {tuned + 1}"):
        check_limits(query, tuned + 1, shipped.manifest, Settings())


@pytest.mark.parametrize(("query", "said"), BAD_QUERIES, ids=[json.dumps(q) for q, _ in BAD_QUERIES])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_bad_query_is_refused_with_the_limit_or_the_fix(live, query, said, method):
    answer = httpx2.request(method, f"{live.url}/generate", params=query, timeout=60)
    assert answer.status_code == 422, answer.text
    assert said in clean(answer)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[1]", JSON, 422),
        (b'{"class": NaN}', JSON, 400),
        (b'{"class": true}', JSON, 422),
        (b'{"class": [3]}', JSON, 422),
        (b'{"class": null}', JSON, 422),
        (b'{"class": 3, "class": 4}', JSON, 400),
        (b"class=3&class=4", {"Content-Type": "application/x-www-form-urlencoded"}, 422),
        (b'{"class": 3, "n": 2.5}', JSON, 422),
        (b'{"class": 3, "n": true}', JSON, 422),
        (b'{"class": 3, "temperature": false}', JSON, 422),
        (b"class=3", {"Content-Type": "text/plain"}, 415),
        (b"x" * 100_000, JSON, 413),
    ],
)
def test_a_bad_generate_body_is_refused(live, body, headers, status):
    answer = post(live, "/generate", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    clean(answer)


@pytest.mark.parametrize(("query", "body"), [("class=3&class=4", None), ("class=3", {"class": 4}), ("n=1", {"class": 3, "n": 1})])
def test_a_parameter_that_is_given_twice_is_refused(live, query, body):
    answer = httpx2.request("POST" if body else "GET", f"{live.url}/generate?{query}", json=body, timeout=60)
    name = "n" if query == "n=1" else "class"
    assert (answer.status_code, clean(answer)) == (
        422,
        f"{name} is given twice: a parameter may be given once, in the query or in the body",
    )


@pytest.mark.parametrize("path", ["/classify", "/energy"])
def test_a_key_that_is_given_twice_is_refused(live, path):
    answer = post(live, path, content=f'{{"image": "{B64}", "image": "{B64}"}}', headers=JSON)
    assert (answer.status_code, "the key 'image' is given twice" in clean(answer)) == (400, True)


def test_many_keys_of_which_one_is_given_twice_cost_little():
    """A pass for each key, which took two seconds of the only HTTP process, would look up 10,000 names 10,000 times."""

    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pairs = [(Counted(i), 0) for i in range(10_000)]
    with pytest.raises(ValueError, match="the key '9999' is given twice"):
        strict_json._unique([*pairs, (Counted(9999), 0)])
    assert Counted.compared < 10_000


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/classify", "POST"), ("PUT", "/energy", "POST"), ("DELETE", "/generate", "GET"), ("POST", "/health", "GET")],
)
def test_a_wrong_method_names_the_right_one(live, method, path, allowed):
    answer = httpx2.request(method, f"{live.url}{path}")
    assert answer.status_code == 405
    assert allowed in clean(answer)


def test_an_unknown_path_points_to_the_docs(live):
    answer = httpx2.get(f"{live.url}/predict")
    assert answer.status_code == 404
    assert "/docs" in clean(answer)


def test_bad_requests_beside_good_ones_harm_none_of_them(live, picture):
    bad = [{"content": b"junk"}, {"content": b""}, {"content": GOOD[:30]}, {"content": b"{", "headers": JSON}]
    expected = raw(live, "/energy", picture).json()["energy"]
    results: list[tuple[int, int, float]] = []

    def worker(i):
        with httpx2.Client(timeout=60) as client:
            for j in range(10):
                if (i + j) % 2:
                    answer = client.post(f"{live.url}/energy", **bad[j % len(bad)])
                    results.append((1, answer.status_code, 0.0))
                else:
                    answer = client.post(f"{live.url}/energy", content=picture)
                    results.append((0, answer.status_code, answer.json()["energy"]))

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for was_bad, status, energy in results:
        assert (400 <= status < 500) if was_bad else (status == 200 and energy == pytest.approx(expected, abs=1e-4))


# streams and samplers ----------------------------------------------------------------------------------------------


def events(answer):
    parts = [part.split("\n") for part in answer.text.split("\n\n") if part.startswith("event: ")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


def test_a_stream_shows_the_chains_moving_and_ends_with_the_same_picture(live, shipped):
    wanted = {"class": 3, "n": 2, "seed": 7, "steps": 20}
    answer = httpx2.get(f"{live.url}/generate", params={**wanted, "stream": True, "every": 5, "scale": 2}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    assert [kind for kind, _ in found] == ["preview"] * (len(found) - 1) + ["done"]
    assert {shown["step"] for _, shown in found[:-1]} <= {5, 10, 15}
    assert len(found) >= 2
    size = shipped.manifest.input
    for _, shown in found[:-1]:
        assert shown["steps"] == 20
        assert len(shown["energy"]) == len(shown["probability"]) == 2
        with Image.open(io.BytesIO(base64.b64decode(shown["png"]))) as picture:
            assert picture.size == (2 * 2 * size.width, 2 * size.height)
            assert pixels.AI_ORIGIN in picture.info["XML:com.adobe.xmp"]
    plain = httpx2.get(f"{live.url}/generate", params={**wanted, "format": "json"}, timeout=60).json()
    assert found[-1][1] == plain


def test_a_bad_request_for_a_stream_is_an_error_not_a_stream(live):
    answer = httpx2.get(f"{live.url}/generate", params={"class": 3, "stream": True, "n": 0})
    assert answer.status_code == 422
    assert "1 to 64" in clean(answer)


def test_step_size_and_temperature_are_the_chains_own(live):
    def draw(**query):
        return httpx2.get(f"{live.url}/generate", params={"class": 1, "seed": 4, "steps": 6, "format": "json", **query}).json()

    base = draw()
    assert draw(step_size=base["step_size"], temperature=1) == base
    pictures = {json.dumps(draw(**query)["images"][0]["png"]) for query in ({}, {"step_size": 0.05}, {"temperature": 400})}
    assert len(pictures) == 3
    cold = draw(temperature=0, step_size=0.1)
    assert (cold["temperature"], cold["step_size"]) == (0.0, 0.1)


def test_pictures_in_company_are_those_alone(live):
    """Bit for bit, whatever else runs, and whatever n they were asked for in."""
    wanted = {"class": 3, "steps": 15, "format": "json"}
    url = f"{live.url}/generate"
    alone = [httpx2.get(url, params={**wanted, "seed": seed}).json()["images"][0]["png"] for seed in range(20, 24)]
    together: dict[int, str] = {}

    def ask(seed):
        together[seed] = httpx2.get(url, params={**wanted, "seed": seed}, timeout=60).json()["images"][0]["png"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20, 24)]
    for thread in threads:
        thread.start()
    at_once = httpx2.get(url, params={**wanted, "seed": 20, "n": 4}, timeout=60).json()["images"]
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(20, 24)] == alone
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in alone]
    for one, picture in zip(at_once, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(one["png"])))), picture)


@pytest.mark.parametrize("path", ["/", "/health", "/info", "/docs", "/redoc", "/openapi.json", "/docs-assets/favicon.png"])
def test_head_is_get_without_the_body(live, path):
    """What balancers probe with."""
    answer, whole = httpx2.head(f"{live.url}{path}"), httpx2.get(f"{live.url}{path}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == whole.headers["content-type"]


def test_head_checks_a_drawing_and_draws_nothing(live):
    for query, status, kind in (
        ({"class": 3, "n": 64, "steps": 80, "format": "json"}, 200, "application/json"),
        ({"class": 3}, 200, "image/png"),
        ({"class": 3, "stream": "true"}, 200, "text/event-stream"),
        ({"class": 99}, 422, "application/problem+json"),
        ({"class": ["3"] * 33}, 422, "application/problem+json"),
    ):
        answer = httpx2.head(f"{live.url}/generate", params=query)
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0], answer.content) == (status, kind, b"")
        assert live.info()["load"]["generate"]["chains"] == 0


# LitServe's key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "key"), [("secret\n", "secret"), (" secret\r\n", "secret"), ("secret", "secret")])
def test_the_line_end_of_a_file_of_secrets_is_no_part_of_the_key(monkeypatch, said, key):
    monkeypatch.setenv("LIT_SERVER_API_KEY", said)
    assert environment_key().sha256 == digest(key)


@pytest.mark.parametrize("said", ["", "\n", "  "])
def test_a_key_that_is_set_to_nothing_opens_no_server(monkeypatch, said, capsys):
    monkeypatch.setenv("LIT_SERVER_API_KEY", said)
    with pytest.raises(EbjdatError, match="LIT_SERVER_API_KEY is set and holds no key: give one, or unset it"):
        build_server(Settings())
    monkeypatch.delenv("LIT_SERVER_API_KEY")
    assert environment_key() is None


@pytest.mark.parametrize("said", ["schlüssel", "two\nlines", "tab\tin"])
def test_a_key_that_no_client_can_send_opens_no_server(monkeypatch, said):
    """Clients refuse the same keys."""
    monkeypatch.setenv("LIT_SERVER_API_KEY", said)
    with pytest.raises(EbjdatError, match="LIT_SERVER_API_KEY has characters that are not printable ASCII"):
        build_server(Settings())


@pytest.mark.slow
def test_litserves_key_guards_our_routes_but_no_probe(tmp_path, monkeypatch, picture):
    """Its own would leave our routes open and shut the probes. This server draws nothing either."""
    monkeypatch.setenv("LIT_SERVER_API_KEY", "secret")
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-workers", "0") as server:
        for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}):
            for path in ("/classify", "/docs", "/info", "/nowhere"):
                refused = httpx2.post(f"{server.url}{path}", content=picture, headers=headers)
                assert refused.status_code == 401
                assert "X-API-Key" in clean(refused)
        known = {"X-API-Key": "secret"}
        assert httpx2.post(f"{server.url}/classify", content=picture, headers=known).status_code == 200
        drawn = httpx2.get(f"{server.url}/generate", params={"class": 3}, headers=known)
        assert drawn.status_code == 404
        assert "--generate-workers 0" in clean(drawn)
        (tmp_path / "cat.png").write_bytes(picture)
        client = [sys.executable, str(ROOT / "clients" / "classify.py"), str(tmp_path / "cat.png"), "--url", server.url]
        assert subprocess.run(client, capture_output=True, check=False).returncode == 0  # clients read the same variable
        assert "generate" not in httpx2.get(f"{server.url}/info", headers=known).json()["load"]


@pytest.mark.slow
def test_the_stock_mode_answers_the_same_by_litserves_own_hooks(tmp_path, live, picture):
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--stock") as server:
        image = {"image": base64.b64encode(picture).decode()}
        assert "https://" not in httpx2.get(f"{server.url}/docs").text  # its own pages would load from a CDN
        stock = httpx2.post(f"{server.url}/classify", json=image, timeout=30).json()
        assert stock == {**raw(live, "/energy", picture).json(), **raw(live, "/classify", picture).json()}
        drawn = {"class": "cat", "seed": 3, "steps": 4, "n": 2}
        ours = httpx2.get(f"{live.url}/generate", params={**drawn, "format": "json"}).json()
        assert httpx2.post(f"{server.url}/generate", json=drawn, timeout=30).json() == ours
        # one bad item does not fail its batch
        results: list[int] = []
        bodies = [image, {"image": "%%%"}, image, {"image": 3}, image, {}]
        threads = [
            threading.Thread(target=lambda b=b: results.append(httpx2.post(f"{server.url}/classify", json=b, timeout=30).status_code))
            for b in bodies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [200, 200, 200, 422, 422, 422]
        for bad in ({"class": "zebra"}, {"class": 3, "steps": 9999}, {"class": 3, "colour": "red"}):
            assert httpx2.post(f"{server.url}/generate", json=bad, timeout=30).status_code == 422
