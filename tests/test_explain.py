"""/explain through a running server: its three answers, what it refuses, and that it shares workers with drawings."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from fastapi import Request
from PIL import Image

from ebjdat_serve import pixels
from ebjdat_serve.counterfactual import BISECTIONS, STEPS, counterfactuals
from ebjdat_serve.engines import load_engine
from ebjdat_serve.manifest import Capabilities
from ebjdat_serve.server.endpoints.explain import explain
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import SHIPPED, Settings
from tests.conftest import HTTP, serving, until


@pytest.fixture(scope="module")
def cat(test_images):
    """A picture that the model takes for a cat."""
    return test_images[0][160]


@pytest.fixture(scope="module")
def sent(cat):
    return pixels.encode_png(cat)


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def explained(server, content, **query):
    answer = HTTP.post(f"{server.url}/explain", params={"format": "json", **query}, content=content)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def answer(live, sent):
    return explained(live, sent, to="dog")


def test_the_answer_names_what_was_found_and_how_far_it_is(answer, cat):
    image = opened(base64.b64decode(answer["png"]))
    delta = (image.astype(float) - cat) / 255
    distance = {"l1": np.abs(delta).sum(), "l2": np.linalg.norm(delta), "linf": np.abs(delta).max()}
    assert answer["distance"] == pytest.approx(distance, rel=1e-6)
    assert answer["valid"] is True
    assert (answer["input"]["label"], answer["counterfactual"]["label"], answer["to"]["label"]) == ("cat", "dog", "dog")
    assert answer["to"]["probability"] == answer["counterfactual"]["probability"]
    assert 0 < answer["distance"]["l2"] <= answer["radius"] == 4.0
    assert answer["model"].startswith("cifar10-small@")


def test_classify_takes_the_counterfactual_for_the_class_asked_for(live, answer):
    said = HTTP.post(f"{live.url}/classify", content=base64.b64decode(answer["png"])).json()
    assert {name: said[name] for name in ("class", "label")} == {"class": 5, "label": "dog"}
    assert said["probability"] == pytest.approx(answer["to"]["probability"], abs=1e-5)


def test_it_is_what_the_library_finds(answer, cat, shipped):
    found = counterfactuals(load_engine(shipped, "onnx", "cpu"), pixels.to_unit(cat[np.newaxis]), np.array([5]), norm="l2", radius=4.0)
    np.testing.assert_array_equal(opened(base64.b64decode(answer["png"])), pixels.to_bytes(found.best)[0])


def test_the_path_begins_at_the_input_climbs_and_is_halved(answer):
    path = answer["path"]
    phases = [one["phase"] for one in path]
    ascent = [one for one in path if one["phase"] == "ascent"]
    assert phases == ["input"] + ["ascent"] * len(ascent) + ["bisection"] * BISECTIONS
    assert (path[0]["l2"], path[0]["linf"]) == (0, 0)
    assert path[0]["probability_input"] == pytest.approx(answer["input"]["probability"], abs=1e-5)
    assert 1 <= len(ascent) <= STEPS
    assert all(later["l2"] > earlier["l2"] for earlier, later in zip([path[0], *ascent], ascent, strict=False))
    assert ascent[-1]["probability"] > ascent[-1]["probability_input"]
    assert min(abs(one["l2"] - answer["distance"]["l2"]) for one in path) < 1e-5


def test_without_a_class_it_is_the_runner_up_of_classify(live, sent):
    top = HTTP.post(f"{live.url}/classify", content=sent).json()["top"]
    assert explained(live, sent)["to"]["class"] == top[1]["class"]


def test_the_strip_shows_input_counterfactual_and_signed_difference_and_is_marked(live, sent, cat, answer):
    said = HTTP.post(f"{live.url}/explain", params={"to": 5, "scale": 2}, content=sent)
    assert (said.status_code, said.headers["content-type"]) == (200, "image/png")
    strip = opened(said.content)
    assert strip.shape == (64, 192, 3)
    before, after, change = (strip[::2, 64 * i : 64 * (i + 1) : 2].astype(float) for i in range(3))
    np.testing.assert_array_equal(before, cat)
    np.testing.assert_array_equal(after, opened(base64.b64decode(answer["png"])))
    scale = float(said.headers["x-difference-scale"])
    np.testing.assert_allclose(change, 128 + scale * (after - before), atol=0.51)
    assert np.abs(change - 128).max() == pytest.approx(127, abs=0.51)
    assert {name: said.headers[f"x-{name}"] for name in ("class", "label", "to-class", "to-label", "valid", "content-origin")} == {
        "class": "3", "label": "cat", "to-class": "5", "to-label": "dog", "valid": "true", "content-origin": "ai-generated"
    }  # fmt: skip
    assert float(said.headers["x-l2"]) == pytest.approx(answer["distance"]["l2"], rel=1e-4)
    for png in (said.content, *(base64.b64decode(answer[name]) for name in ("png", "strip"))):
        image = Image.open(io.BytesIO(png))
        assert b"trainedAlgorithmicMedia" in png
        assert image.text["Source"].startswith("AI-generated: a counterfactual")


def test_events_show_the_search_and_end_with_what_json_answers(live, sent, answer):
    with httpx2.stream("POST", f"{live.url}/explain", params={"to": "dog", "stream": "true"}, content=sent, timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        text = "".join(stream.iter_text())
    blocks = [block.split("\n", 1) for block in text.strip().split("\n\n") if block.startswith("event: ")]
    said = [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]
    assert [kind for kind, _ in said] == ["preview"] * (len(said) - 1) + ["done"]
    assert len(said) >= 2
    assert said[-1][1] == answer
    steps = [one["step"] for kind, one in said[:-1]]
    assert steps == sorted(set(steps))
    assert all(opened(base64.b64decode(one["strip"])).shape == (32, 96, 3) for _, one in said[:-1])


def test_in_l_inf_no_pixel_changes_by_more_than_the_radius(live, sent, cat):
    said = explained(live, sent, norm="linf", radius=8 / 255, to="dog")
    delta = opened(base64.b64decode(said["png"])).astype(int) - cat
    assert np.abs(delta).max() <= 8
    assert said["norm"] == "linf"


def test_where_there_is_none_it_says_so_with_the_last_that_was_tried(live, sent):
    said = explained(live, sent, to="ship", radius=0.1)
    assert said["valid"] is False
    assert said["counterfactual"]["label"] == "cat"
    assert 0 < said["distance"]["l2"] <= 0.1
    assert [one["phase"] for one in said["path"]] == ["input"] + ["ascent"] * STEPS


def test_with_a_probability_it_is_reached_or_the_answer_says_no(live, sent, answer):
    more = explained(live, sent, to="dog", probability=0.5)
    assert more["valid"]
    assert more["to"]["probability"] >= 0.5
    assert more["distance"]["l2"] > answer["distance"]["l2"]
    assert not explained(live, sent, to="dog", probability=0.999)["valid"]


def test_of_its_own_class_a_picture_is_its_own_explanation(live, sent, cat):
    said = explained(live, sent, to="cat")
    assert said["valid"]
    np.testing.assert_array_equal(opened(base64.b64decode(said["png"])), cat)


def test_a_form_and_json_bring_the_image_too(live, sent, answer):
    for request in ({"json": {"image": base64.b64encode(sent).decode()}}, {"files": {"image": sent}}):
        said = HTTP.post(f"{live.url}/explain", params={"to": "dog", "format": "json"}, **request).json()
        assert said["png"] == answer["png"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("to=unicorn", "to 'unicorn' is unknown: an index 0 to 9 or a name, airplane"),
        ("to=10", "to '10' is unknown"),
        ("radius=0", "radius: Input should be greater than 0"),
        ("radius=-1", "radius: Input should be greater than 0"),
        ("radius=nan", "radius"),
        ("radius=inf", "radius"),
        ("radius=56", "at most 55.4256, which holds every image, in l2"),
        ("norm=linf&radius=1.5", "at most 1, which holds every image, in linf"),
        ("norm=l7", "norm: Input should be 'l2' or 'linf'"),
        ("probability=1", "probability: Input should be less than 1"),
        ("scale=0", "scale must be 1 to 16, not 0"),
        ("scale=17", "scale must be 1 to 16, not 17"),
        ("to=dog&to=cat", "to is given twice: a parameter may be given once"),
        ("format=gif", "format: Input should be 'png' or 'json'"),
        ("class=3", "class is unknown; known are to, norm, radius, probability, format, stream, scale"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named_with_its_limit(live, sent, query, names):
    refused = HTTP.post(f"{live.url}/explain?{query}", content=sent)
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    assert names in refused.json()["detail"]


def test_a_list_and_what_is_no_image_are_refused(live, sent):
    one = base64.b64encode(sent).decode()
    refused = HTTP.post(f"{live.url}/explain", json={"images": [one]})
    assert refused.status_code == 422
    assert "send one image" in refused.json()["detail"]
    assert HTTP.post(f"{live.url}/explain", content=b"no image").status_code == 422
    assert HTTP.get(f"{live.url}/explain").status_code == 405


# workers -------------------------------------------------------------------------------------------------------------


def chains(server):
    return server.info()["load"]["generate"]["chains"]


@contextlib.contextmanager
def stopped(server):
    """Have the generate worker stand still until the block ends."""
    worker = next(pid for pid in server.children() if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8") == "ebjdat-generate\n")
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def asking(server, request):
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(request)
    return connection


def posted(content, query=""):
    return b"POST /explain?%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (query.encode(), len(content), content)


def test_a_client_that_leaves_is_not_worked_for(live, sent):
    with stopped(live):
        for query in ("", "stream=true"):
            with asking(live, posted(sent, query)):
                until(lambda: chains(live) == 1)
            until(lambda: chains(live) == 0)
    assert explained(live, sent)["valid"]


@pytest.mark.slow
def test_it_is_answered_504_at_the_deadline(tmp_path, sent):
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-deadline", "1") as hasty:
        with stopped(hasty):
            late = HTTP.post(f"{hasty.url}/explain", content=sent)
        assert late.status_code == 504
        assert "no answer within 1 s" in late.json()["detail"]
        assert int(late.headers["retry-after"]) >= 1


def test_it_counts_as_a_chain_of_its_client(live, sent):
    with stopped(live), contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(asking(live, b"GET /generate?class=2&n=64&steps=1 HTTP/1.1\r\nHost: x\r\n\r\n"))
        until(lambda: chains(live) == 128)
        refused = HTTP.post(f"{live.url}/explain", content=sent)
    until(lambda: chains(live) == 0)
    assert refused.status_code == 429
    assert "128 of your chains are running" in refused.json()["detail"]


def test_it_is_not_kept_waiting_by_a_long_drawing_which_goes_on(live, sent, answer):
    left = lambda: live.info()["load"]["generate"]["chain_steps_left"]  # noqa: E731
    with asking(live, b"GET /generate?class=2&n=8&steps=1000 HTTP/1.1\r\nHost: x\r\n\r\n"):
        until(lambda: 0 < left() < 8000)
        before = left()
        assert explained(live, sent, to="dog")["png"] == answer["png"]
        assert chains(live) == 8  # the drawing is still there,
        until(lambda: left() < before)  # and has gone on
    until(lambda: chains(live) == 0)


@pytest.mark.slow
def test_of_a_server_that_draws_nothing_it_is_refused_by_name(tmp_path, sent):
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-workers", "0") as none:
        refused = HTTP.post(f"{none.url}/explain", content=sent)
        assert refused.status_code == 404
        assert "serve --generate-workers 0" in refused.json()["detail"]
        assert "/explain" not in HTTP.get(f"{none.url}/").json()["paths"]


def test_a_model_without_a_gradient_says_so(shipped):
    lacking = replace(shipped, manifest=replace(shipped.manifest, capabilities=Capabilities(gradient="its first layer rounds")))
    served = ServedModel("key", lacking, shipped.calibration(), 0.05, "", [])
    service = SimpleNamespace(generate_queue=object(), settings=Settings(), manager=SimpleNamespace(active=served))
    request = Request({"type": "http", "query_string": b"", "headers": [], "client_name": "somebody"})
    with pytest.raises(Problem, match=r"cifar10-small@.* explains nothing: its first layer rounds") as refused:
        asyncio.run(explain(service, request))
    assert refused.value.status == 409
    assert lacking.functions == ("classify", "step")
    assert "score.onnx" not in lacking.required
