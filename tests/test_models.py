"""Several models in one server: paths, names, keys, refreshes, faults and memory of each."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server import app
from ebjdat_serve.server.app import build_server
from ebjdat_serve.server.served_model import named_models
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.store import publish
from tests.classifiers import images, write
from tests.conftest import DIGITS, HTTP, Live, serving, until


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A store with a tiny classifier that has no gradient."""
    home = tmp_path_factory.mktemp("other")
    publish(write(home / "one", version="1-one"), home / "store")
    return home / "store"


@pytest.fixture(scope="module")
def two(tmp_path_factory, other) -> Live:
    log = tmp_path_factory.mktemp("two") / "server.log"
    with serving(DIGITS, log, "--device", "cpu", "--refresh-interval", "0.1", more=(f"tiny={other}",)) as server:
        yield server


@pytest.fixture(scope="module")
def png() -> bytes:
    return encode_png(images(1, (12, 10), 3)[0])


def workers_of(server: Live, name: str) -> list[int]:
    """The processes that end with the model: what /models counts the memory of."""
    return [pid for pid in server.children() if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").startswith(name)]


def test_each_model_answers_under_its_name_and_the_first_without(two, png):
    names = [one["name"] for one in HTTP.get(f"{two.url}/models").json()["models"]]
    digits = Bundle.load(DIGITS).manifest
    assert names == [digits.name, "tiny"]
    for path in ("/classify", "/energy"):
        answers = [HTTP.post(f"{two.url}{prefix}{path}", content=png).json() for prefix in ("", f"/models/{digits.name}", "/models/tiny")]
        assert answers[0] == answers[1]
        assert answers[0]["model"].startswith(f"{digits.name}@")
        assert answers[2]["model"].endswith("@1-one")
    info = HTTP.get(f"{two.url}/models/tiny/info").json()
    assert HTTP.get(f"{two.url}/models/tiny").json()["labels"] == info["labels"] != HTTP.get(f"{two.url}/info").json()["labels"]
    assert HTTP.get(f"{two.url}/models/tiny/health").json() == {"status": "ok"}
    assert HTTP.get(f"{two.url}/models/{digits.name}/generate?class=1&steps=1").status_code == 200
    refused = HTTP.get(f"{two.url}/models/tiny/generate?class=1")
    assert refused.status_code == 409
    assert "@1-one" in refused.json()["detail"]


@pytest.mark.parametrize(
    "path", ["/models/none/classify", "/models//classify", "/models/tiny/models", "/models/tiny/docs", "/models/tiny/", "/models/"]
)
def test_what_no_model_has_is_not_found(two, png, path):
    answer = HTTP.post(f"{two.url}{path}", content=png)
    assert answer.status_code == 404
    if path == "/models/none/classify":
        assert "GET /models" in answer.json()["detail"]


def test_memory_of_each_is_told_and_the_list_says_which_is_the_default(two):
    first, second = HTTP.get(f"{two.url}/models").json()["models"]
    assert (first["default"], second["default"]) == (True, False)
    assert first["ready"] and second["ready"]
    assert (
        2**20 < second["memory_bytes"] < first["memory_bytes"] < 2**30
    )  # the second has no worker that draws: no gradient, but a store's next may


def test_one_is_refreshed_under_load_and_the_other_never_notices(two, other, png, tmp_path):
    stop, codes, names = threading.Event(), [], set()

    def ask():
        while not stop.is_set():
            for prefix in ("", "/models/tiny"):
                answer = HTTP.post(f"{two.url}{prefix}/classify", content=png)
                codes.append(answer.status_code)
                names.add(answer.json()["model"])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        publish(write(tmp_path / "two", version="2-two", gradient=True), other)
        until(lambda: any(name.endswith("@2-two") for name in names))
    finally:
        stop.set()
        thread.join()
    assert set(codes) == {200}
    assert len({name for name in names if name.startswith(Bundle.load(DIGITS).manifest.name)}) == 1
    assert HTTP.post(f"{two.url}/models/tiny/classify?check=none", content=png).json()["model"].endswith("@2-two")


def test_a_worker_of_one_that_dies_leaves_the_other_at_work(two, png):
    pids = sorted(workers_of(two, "ebjdat-classify"))
    before = HTTP.get(f"{two.url}/models").json()["models"]
    assert all(one["ready"] for one in before)
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: HTTP.get(f"{two.url}/health").status_code == 503, 10)
    codes = [[HTTP.post(f"{two.url}{prefix}/classify", content=png).status_code for prefix in ("", "/models/tiny")] for _ in range(10)]
    assert any(set(column) == {200} for column in zip(*codes, strict=True))
    until(lambda: all(one["ready"] for one in HTTP.get(f"{two.url}/models").json()["models"]))
    until(lambda: HTTP.get(f"{two.url}/health").status_code == 200)


def test_names_are_given_or_the_bundles_own_and_never_twice(tmp_path, other):
    settings = Settings(SHIPPED, more=(DIGITS, Path(f"second={DIGITS}")))
    assert named_models(settings) == [("", SHIPPED), ("", DIGITS), ("second", DIGITS)]
    build_server(settings)
    with pytest.raises(EbjdatError, match=r"two models are named .*: give one another name, as in"):
        build_server(replace(settings, more=(SHIPPED,)))
    for name in (".x", "a b", "a" * 65, "é"):
        with pytest.raises(EbjdatError, match="a model's name is of 1 to 64 letters"):
            named_models(replace(settings, more=(Path(f"{name}={DIGITS}"),)))


def test_a_folder_whose_name_has_an_equals_sign_is_a_folder(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_models(Settings(odd)) == [("", odd)]


def test_threads_are_shared_and_every_model_has_queues_of_its_own(other):
    server, _ = build_server(Settings(SHIPPED, threads=4, more=(DIGITS, Path(f"tiny={other}"))))
    workers = server.litapi_connector.lit_apis
    assert {worker._settings.threads for worker in workers} == {1}
    assert [worker.api_path for worker in workers[-2:]] == ["/tiny/classify", "/tiny/generate"]


def test_the_start_says_by_which_name_a_model_is_served():
    model = SimpleNamespace(name="digits@1", bundle=SimpleNamespace(manifest=SimpleNamespace(name="digits")))
    assert app.shown("digits", model) == "digits@1"
    assert app.shown("second", model) == "second=digits@1"
