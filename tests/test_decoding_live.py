"""Decoding as a client sees it: hostile images, processes that are killed, clients that leave, deadlines, stop signals."""

import base64
import io
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from benchmarks.hostile_images import encoded, jpeg_of_scans, png, webp
from benchmarks.load import open_loop, request
from ebjdat_serve import pixels
from ebjdat_serve.contract import Input
from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import HTTP, serving, until
from tests.test_faults import alive, connect, gone
from tests.test_headers import COSTLY, HOSTILE, colour

SMALL = encoded(colour((300, 300)))
LARGE = encoded(Image.effect_noise((1200, 1000), 60).convert("RGB"), "PNG", compress_level=1)
CLASSIFIES = ("--device", "cpu", "--generate-workers", "0", "--decoders", "2", "--decode-memory", str(2**29))
"""Two decoders of large images, as on one CPU."""
ROWS = 4000
"""Of a 12- or 24-megapixel image."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(SHIPPED, tmp_path_factory.mktemp("decoding") / "log", *CLASSIFIES) as running:
        until(lambda: len(running.decoders()) == 3)
        yield running


def classify(server, data, timeout=30):
    return httpx2.post(f"{server.url}/classify", content=data, timeout=timeout)


def nice(pid):
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[16])


def of_large(server):
    """Return the decoders of large images, once all are there and have stood back."""
    until(lambda: len(server.decoders()) == 3 and sum(nice(pid) > os.nice(0) for pid in server.decoders()) == 2)
    return [pid for pid in server.decoders() if nice(pid) > os.nice(0)]


def zygote(server):
    return next(pid for pid in server.children() if b"ebjdat_serve.decoding.zygote" in cmdline(pid) and pid not in server.decoders())


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def freeze(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def resident(server):
    """Return the memory in MiB that each process of the server has at the most had."""
    pids = [server.process.pid, *server.children()]
    status = [Path(f"/proc/{pid}/status").read_text(encoding="ascii") for pid in pids]
    return [int(each.partition("VmHWM:")[2].split()[0]) / 1024 for each in status]


def test_what_is_too_large_is_answered_413_and_what_is_of_no_depth_that_is_read_422(server):
    deep = bytearray(encoded(colour((40, 40)), "JPEG"))
    frame = deep.index(b"\xff\xc0")
    deep[frame + 4] = 12  # bits per sample
    for padding in (0, 2**20):  # judged in the HTTP process, and by a decoder
        answer = classify(server, bytes(deep) + bytes(padding))
        assert (answer.status_code, answer.json()["detail"]) == (422, "the JPEG has 12 bits per sample; the limit is 8")
        answer = classify(server, webp(16_000, 2_500) + bytes(padding))
        assert answer.status_code == 413
        assert "16000 x 2500 pixels; the limit is 25000000" in answer.json()["detail"]


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=list(HOSTILE))
def test_what_broke_the_server_is_refused_at_once(server, data, said):
    began = time.monotonic()
    answer = classify(server, data)
    assert answer.status_code == (413 if "limit is" in said else 422)
    assert said in answer.json()["detail"]
    assert time.monotonic() - began < 5
    assert max(resident(server)) < 400


@pytest.mark.slow
def test_images_that_cost_more_than_their_pixels_are_answered_and_write_no_log(server):
    before = len(server.log.read_text(encoding="utf-8").splitlines())
    for data in COSTLY.values():
        assert classify(server, data).status_code in (200, 422)
    said = server.log.read_text(encoding="utf-8").splitlines()[before:]
    assert not [line for line in said if not line.startswith("ERROR: drift of the traffic")]  # which they are


def test_each_format_that_info_names_is_answered(server):
    formats = server.info()["limits"]["formats"]
    assert set(formats) >= {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"}
    picture = colour((40, 40))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        answer = classify(server, encoded(picture, kind))
        assert answer.status_code == 200, (kind, answer.text)
    refusal = classify(server, b"%PDF-1.7 and more")
    assert refusal.status_code == 422
    assert f"it is a PDF; send {', '.join(formats)}" in refusal.json()["detail"]


def camera(width, height, kind, **options):
    gradient = np.add.outer(np.arange(height) * 200 // height, np.arange(width) * 55 // width).astype(np.uint8)
    return encoded(Image.fromarray(np.stack([gradient, gradient[::-1], gradient[:, ::-1]], 2)), kind, **options)


@pytest.mark.parametrize(
    ("width", "kind", "options"),
    [(12_000, "JPEG", {}), (6000, "PNG", {"compress_level": 1}), (6000, "WEBP", {"method": 0}), (6000, "AVIF", {"speed": 10})],
    ids=["48 MP JPEG", "24 MP PNG", "24 MP WebP", "24 MP AVIF"],
)
def test_the_largest_images_are_answered_alone(server, width, kind, options):
    data = camera(width, ROWS, kind, **options)
    answer = classify(server, data)
    assert answer.status_code == 200, answer.text
    assert max(resident(server)) < 512


@pytest.mark.slow
def test_a_server_without_draft_ends_jpegs_where_it_ends_all_images(tmp_path):
    with serving(
        SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-workers", "0", "--no-jpeg-draft", "--max-pixels", "1000000"
    ) as exact:
        limits = exact.info()["limits"]
        assert limits["jpeg_pixels"] == limits["image_pixels"] == 1_000_000
        answer = classify(exact, camera(1200, 1000, "JPEG"))
        assert answer.status_code == 413
        assert "1200 x 1000 pixels; the limit is 1000000" in answer.json()["detail"]
        assert classify(exact, camera(1000, 1000, "JPEG")).status_code == 200


def test_a_list_is_one_job_whose_refusal_names_the_image(server):
    def ask(*images):
        document = {"images": [base64.b64encode(one).decode() for one in images]}
        return httpx2.post(f"{server.url}/classify", json=document, timeout=30)

    assert len(ask(*[LARGE] * 2, *[SMALL] * 2).json()["results"]) == 4
    refused = ask(SMALL, LARGE, LARGE[: len(LARGE) // 2])
    assert refused.status_code == 422
    assert refused.json()["index"] == 2
    assert "images[2]: the image is truncated or damaged" in refused.json()["detail"]
    together = ask(*[png(4000, 4000)] * 2, LARGE)
    assert together.status_code == 413
    assert "send them one by one" in together.json()["detail"]


def test_a_killed_decoder_costs_its_own_request_and_nobody_else_anything(server):
    large = of_large(server)
    freeze(large)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(classify(server, LARGE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: server.info()["load"]["classify"]["requests"] == 2)
    time.sleep(0.2)
    assert [classify(server, SMALL).status_code for _ in range(5)] == [200] * 5
    for pid in large:
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all(answer.headers["Retry-After"] == "1" and "try again" in answer.json()["detail"] for answer in answers)
    assert classify(server, LARGE).status_code == 200


def test_a_killed_zygote_costs_nobody_anything(server):
    large, old = of_large(server), zygote(server)
    freeze(large)
    answers = []
    threads = [threading.Thread(target=lambda data=data: answers.append(classify(server, data).status_code)) for data in (LARGE, SMALL)]
    for thread in threads:
        thread.start()
    until(lambda: server.info()["load"]["classify"]["requests"] >= 1)
    os.kill(old, signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert answers == [200, 200]
    gone([old, *large])
    assert zygote(server) != old


def test_the_decode_of_a_client_that_leaves_is_ended(server):
    large = of_large(server)
    freeze(large)
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(LARGE), LARGE))
    until(lambda: server.info()["load"]["classify"]["requests"] == 20)
    for client in clients:
        client.close()
    until(lambda: server.info()["load"]["classify"]["requests"] == 0, 3)
    gone(large)
    assert classify(server, LARGE).status_code == 200


def test_a_client_with_many_large_images_delays_anothers_by_no_more_than_one_of_them(server):
    port = int(server.url.rsplit(":", 1)[1])
    heavy = png(5000, 5000, pixels=bytes(5000 * 15_001))  # half a second or more, each
    greedy = [socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) for _ in range(40)]
    try:
        for client in greedy:
            client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(heavy), heavy))
        until(lambda: server.info()["load"]["classify"]["requests"] == 40)
        for data in (LARGE, SMALL, heavy):
            assert classify(server, data).status_code == 200
        assert server.info()["load"]["classify"]["requests"] > 20  # of the 40, which came first
    finally:
        for client in greedy:
            client.close()
    until(lambda: server.info()["load"]["classify"]["requests"] == 0, 3)


@pytest.mark.slow
def test_a_decode_ends_at_the_deadline(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *CLASSIFIES, "--classify-deadline", "1") as server:
        large = of_large(server)
        freeze(large)
        began = time.monotonic()
        answer = classify(server, LARGE)
        assert answer.status_code == 504
        assert "not decoded by the deadline" in answer.json()["detail"]
        assert 0.9 < time.monotonic() - began < 4
        until(lambda: sum(map(alive, large)) == 1)


@pytest.mark.slow
def test_no_decoder_survives_the_http_process(tmp_path):
    """Nor the main process: test_faults, of all processes."""
    with serving(SHIPPED, tmp_path / "log", *CLASSIFIES) as server:
        of_large(server)
        tree = server.children()
        os.kill(next(pid for pid in tree if zygote(server) in children_of(pid)), signal.SIGKILL)
        gone(tree)


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@pytest.mark.slow
@pytest.mark.parametrize("graceful", [2, 6])
def test_a_stop_signal_is_obeyed_in_time_while_images_are_decoded(tmp_path, graceful):
    with serving(SHIPPED, tmp_path / "log", *CLASSIFIES, "--graceful-timeout", str(graceful)) as server:
        freeze(of_large(server))
        tree, answers = [server.process.pid, *server.children()], []

        def ask():
            answer = classify(server, LARGE)
            answers.append((answer.status_code, answer.json()["detail"], time.monotonic()))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: server.info()["load"]["classify"]["requests"] == 3)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(6) == 0
        for thread in threads:
            thread.join(5)
        assert [(status, "the server is stopping" in said) for status, said, _ in answers] == [(503, True)] * 3
        assert all(graceful / 2 <= came - began < 5 for _, _, came in answers)
        gone(tree)
        assert "Traceback" not in server.log.read_text()


def test_others_are_answered_while_hostile_images_come_without_pause(server):
    """benchmarks/hostile_load.py measures how quickly."""
    port = int(server.url.rsplit(":", 1)[1])
    hostile = [data for data, _ in HOSTILE.values()] + [*COSTLY.values(), webp(10_000, 2_500), jpeg_of_scans(64, (4000, 4000))]
    over = threading.Event()
    seen = set()

    def attack(first):
        with httpx2.Client(timeout=30) as client:
            for turn in range(10**6):
                if over.is_set():
                    return
                seen.add(client.post(f"{server.url}/classify", content=hostile[(first + turn) % len(hostile)]).status_code)

    threads = [threading.Thread(target=attack, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    try:
        result = open_loop(port, request("/classify", SMALL), 20, 3)
        assert HTTP.get(f"{server.url}/health").status_code == 200
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert result.refused == 0
    assert len(result.seconds) > 20
    assert seen <= {200, 413, 422}
    assert sum(resident(server)) < 1000


def test_the_answer_is_that_of_one_process(server):
    photo = camera(900, 700, "JPEG")
    here = pixels.decode(photo, Input(32, 32))
    buffer = io.BytesIO()
    Image.fromarray(here).save(buffer, "PNG")
    one, other = (httpx2.post(f"{server.url}/energy", content=data).json() for data in (photo, buffer.getvalue()))
    assert one["energy"] == other["energy"]
