"""Tests of the clients against unexpected servers, proxies, files and names."""

import ast
import csv
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebjdat_serve import pixels
from ebjdat_serve.decoding.header import Limits
from tests.conftest import ROOT

CLIENTS = ("classify", "screen", "generate", "explain")
PAGE = b"<html><body>\x1b[31m moved, down or busy \xe9</body></html>"
GOOD = b'{"class":3,"label":"cat","probability":0.5,"energy":-1.0,"p_value":0.5,"suspicious":false}'
PNG = pixels.encode_png(np.zeros((8, 8, 3), np.uint8))
HTML = {"Content-Type": "text/html"}


class Handler(BaseHTTPRequestHandler):
    """Answers what the test's script says next, then as the real server would."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for the client to acknowledge its headers

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.answer(self.rfile.read(length))

    def do_GET(self):
        self.answer(b"")

    def answer(self, body):
        hostile = self.server.hostile
        if self.path == "/health":
            return self.reply(200, {}, b"{}")
        with hostile.lock:
            hostile.requests.append((self.path, dict(self.headers), body))
            act = hostile.act(len(hostile.requests), body)
        if act == "drop":
            self.close_connection = True
            return None
        good = (
            (200, {"Content-Type": "image/png", "X-Valid": "true"}, PNG)
            if self.path.startswith(("/generate", "/explain"))
            else (200, {}, GOOD)
        )
        return self.reply(*(act or good))

    def reply(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def hostile_server(act):
    """A server that answers ``act(n, body)`` to request n from 1: "drop", (status, headers, body), or None for what is right."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hostile = SimpleNamespace(act=act, requests=[], lock=threading.Lock(), url=f"http://127.0.0.1:{server.server_port}")
    server.hostile.close = lambda: (server.shutdown(), server.server_close())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hostile
    finally:
        server.hostile.close()
        thread.join()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a client in this process, without its pauses; return (exit code, stdout, stderr, the pauses)."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"client_{name}", ROOT / "clients" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        pauses = []
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append, time=time.time))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = module.main()
        return code, *capsys.readouterr(), pauses

    return run


@pytest.fixture
def picture_file(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(PNG)
    return file


def arguments(name, picture_file):
    output = ("-o", picture_file.with_name("drawn.png")) if name in ("generate", "explain") else ()
    return ("3" if name == "generate" else picture_file, *output)


ANSWERS = {
    "a page for 308": (308, {"Location": "https://elsewhere.invalid/", **HTML}, PAGE),
    "a page for 302": (302, {"Location": "/login", **HTML}, PAGE),
    "a page for 413": (413, HTML, PAGE),
    "a page for 502": (502, HTML, PAGE),
    "a page for 503": (503, HTML, PAGE),
    "a page for 200": (200, HTML, PAGE),
    "nothing": (200, {}, b""),
    "half of it": (200, {"Content-Type": "application/json"}, GOOD[:40]),
    "a list": (200, {"Content-Type": "application/json"}, b"[1, 2]"),
    "a number": (500, {"Content-Type": "application/json"}, b"7"),
    "the wrong fields": (200, {"Content-Type": "application/json"}, b'{"label": 3, "probability": "high"}'),
    "brackets without end": (200, {"Content-Type": "application/json"}, b"[" * 100_000),
    "a body that is no gzip": (200, {"Content-Encoding": "gzip"}, b"not gzip"),
    "a detail of many lines": (422, {"Content-Type": "application/problem+json"}, b'{"detail": "one\\ntwo\\u001b[31m"}'),
}


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_no_answer_is_one_line_with_the_status(run, picture_file, name, answer):
    status = ANSWERS[answer][0]
    with hostile_server(lambda n, body: ANSWERS[answer]) as server:
        code, out, err, pauses = run(name, *arguments(name, picture_file), "--url", server.url)
    assert code == 1
    said = list(csv.reader(out.splitlines()))[1][-1] if name == "screen" else err.strip()
    assert "\n" not in said
    assert said.isprintable()
    assert f"HTTP {status}" in said or "gzip" in answer
    assert not picture_file.with_name("drawn.png").exists()  # nothing is saved that is no image
    assert (len(server.requests), len(pauses)) == ((5, 4) if status in (502, 503) else (1, 0))
    if status == 308:
        assert "https://elsewhere.invalid/" in said


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("trouble", ["drop", (503, {"Retry-After": "0"}, b""), (502, HTML, PAGE), (429, {"Retry-After": "2"}, PAGE)])
def test_trouble_that_passes_is_waited_for(run, picture_file, name, trouble):
    with hostile_server(lambda n, body: trouble if n <= 2 else None) as server:
        code, _, err, pauses = run(name, *arguments(name, picture_file), "--url", server.url)
    assert code == 0, err
    assert len(server.requests) == 3
    assert len(pauses) == 2


def module_of(name="classify"):
    spec = importlib.util.spec_from_file_location("client", ROOT / "clients" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLASSIFY = module_of()


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        (20.0, 15, 20),  # a date, so many seconds from now
        (-1e9, 0, 0),
        (1e6, 30, 30),
        ("86400", 30, 30),
        ("inf", 30, 30),
        ("-5", 0, 0),
        ("nan", 7, 7),
        ("soon", 7, 7),
        ("", 7, 7),
    ],
)
def test_retry_after_is_a_number_or_a_date_and_has_a_bound(after, least, most):
    after = after if isinstance(after, str) else formatdate(time.time() + after, usegmt=True)
    assert least <= CLASSIFY.pause(after, 7.0) <= most


@settings(max_examples=40)
@given(st.text(st.characters(codec="latin-1")) | st.builds("Mon, {} Jan {} {}:00:00 {}".format, *[st.integers(-99, 10**12)] * 4))
def test_no_retry_after_breaks_a_client(after):
    assert 0 <= CLASSIFY.pause(after, 7.0) <= 30


@pytest.fixture
def thirty(tmp_path):
    folder = tmp_path / "thirty"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.png").write_bytes(PNG + bytes([i]))
    return folder


def rows(out):
    return list(csv.DictReader(out.splitlines()))


def test_a_dropped_connection_does_not_end_a_screening(run, thirty):
    with hostile_server(lambda n, body: "drop" if n == 8 else None) as server:
        code, out, err, _ = run("screen", thirty, "--url", server.url)
    assert code == 0, err
    assert [row["error"] for row in rows(out)] == [""] * 30


def test_a_picture_that_kills_every_connection_costs_its_own_row(run, thirty):
    with hostile_server(lambda n, body: "drop" if body.endswith(b"\x08") else None) as server:
        code, out, _, _ = run("screen", thirty, "-j", "1", "--url", server.url)
    assert code == 1
    wrong = {Path(row["file"]).name: row["error"] for row in rows(out) if row["error"]}
    assert list(wrong) == ["08.png"]
    assert "after 5 tries" in wrong["08.png"]


def test_a_server_that_goes_away_for_good_leaves_a_whole_report_and_is_not_waited_for_at_every_picture(run, thirty):
    with hostile_server(lambda n, body: "drop" if n > 10 else None) as server:
        code, out, _, pauses = run("screen", thirty, "-j", "1", "--url", server.url)
    assert code == 1
    assert [bool(row["error"]) for row in rows(out)] == [True] * 20 + [False] * 10  # the worst first
    assert len(pauses) == 4


def test_a_screening_names_every_file_and_sends_what_is_a_picture(run, tmp_path):
    folder = tmp_path / "in"
    (folder / "album.jpg").mkdir(parents=True)
    (folder / "elsewhere").symlink_to(tmp_path)
    sent = [b"caf\xe9.png", b"called.gif", b"nothing", b"album.jpg/inner.png", b"damaged.jpg", b"new\nline.png", b"no\xc3\xa9.png"]
    for name in sent:
        (folder / os.fsdecode(name)).write_bytes(b"damaged" if b"damaged" in name else PNG)
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07\x00\x02")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / "empty").touch()
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")
    with hostile_server(lambda n, body: None) as server:
        code, out, err, _ = run("screen", folder, "--url", server.url)
    found = {row["file"].removeprefix(f"{folder}/"): row["error"] for row in csv.DictReader(out.splitlines(keepends=True))}
    skipped = {name for name, error in found.items() if error.startswith("skipped: ")}
    assert skipped == {"._a.png", "notes.txt", "empty", "pipe.png", "elsewhere"}
    assert {name for name, error in found.items() if not error} == {os.fsdecode(n).replace("\udce9", "\\xe9") for n in sent}
    assert found["dangling.png"] == "No such file or directory"
    assert len(server.requests) == len(sent)
    assert code == 1
    assert "8 images, 0 suspicious, 0 to review, 1 refused, 5 skipped" in err


def test_what_is_named_is_sent_and_what_is_not_there_is_a_row(run, tmp_path, picture_file):
    odd = tmp_path / "notes.txt"
    odd.write_text("no image", encoding="utf-8")
    with hostile_server(lambda n, body: None) as server:
        code, out, _, _ = run("screen", odd, picture_file, tmp_path / "absent*.png", "--url", server.url)
    assert code == 1
    assert [bool(row["error"]) for row in rows(out)] == [True, False, False]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "odd",
    [
        b'"p_value":"abc"',
        b'"p_value":[1]',
        b'"probability":null',
        b'"energy":1' + b"0" * 400,
        b'"label":"\\ud800"',
        b'"reasons":[3]',
        b'"why":7',
    ],
)
def test_one_odd_answer_costs_its_own_row_alone(run, thirty, tmp_path, odd):
    """It lost the whole report, and the one before."""
    answer = GOOD.replace(b"}", b"," + odd + b"}")  # of two members of a name the last counts
    report, sheet = tmp_path / "report.csv", tmp_path / "sheet.html"
    with hostile_server(lambda n, body: (200, {}, answer) if n == 3 else None) as server:
        code, _, err, _ = run("screen", thirty, "-j", "1", "-o", report, "--sheet", sheet, "--url", server.url)
    found = rows(report.read_text(encoding="utf-8"))
    wrong = [row for row in found if row["error"]]
    assert len(found) == 30
    assert (code, len(wrong)) in ((1, 1), (0, 0))  # a label of half a character is written as what it is
    assert "Traceback" not in err
    assert sheet.read_text(encoding="utf-8").count("<figure") == 30


@pytest.mark.parametrize("name", ["classify", "screen"])
def test_any_name_can_be_printed_in_any_locale(tmp_path, name):
    odd = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    odd.write_bytes(PNG)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with hostile_server(lambda n, body: None) as server:
        command = [sys.executable, str(ROOT / "clients" / f"{name}.py"), str(odd), str(tmp_path / "absent\udce9"), "--url", server.url]
        done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=60)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert rb"caf\xe9" in done.stdout
    assert rb"absent\xe9" in done.stdout + done.stderr


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://[::1",
        "ftp://localhost",
        "http://",
        "http://a..b",
        f"http://{64 * 'a'}",
        "http://localhost:65536",
        "http://localhost:99999999999999999999",
    ],
)
def test_an_address_that_is_none_is_named(run, picture_file, capsys, name, url):
    with pytest.raises(SystemExit) as ended:
        run(name, *arguments(name, picture_file), "--url", url)
    assert ended.value.code == 2
    assert "--url" in capsys.readouterr().err


@pytest.mark.parametrize("name", CLIENTS)
def test_the_key_is_sent_without_the_line_end_of_its_file(run, picture_file, monkeypatch, name):
    monkeypatch.setenv("LIT_SERVER_API_KEY", "secret\n")
    with hostile_server(lambda n, body: None) as server:
        code, _, err, _ = run(name, *arguments(name, picture_file), "--url", server.url)
    assert code == 0, err
    assert server.requests[0][1]["X-API-Key"] == "secret"


def test_every_client_reads_answers_in_the_same_way():
    """Each is one file to copy, so the lines are written three times."""
    names = (
        "TRIES",
        "LONGEST",
        "BUSY",
        "key",
        "Refused",
        "Unreachable",
        "address",
        "absent",
        "ask",
        "pause",
        "reason",
        "one_line",
        "named",
        "unwritten",
    )
    reads = ("LARGEST", "content")
    found = []
    for client in CLIENTS:
        tree = ast.parse((ROOT / "clients" / f"{client}.py").read_text(encoding="utf-8"))
        named = {
            getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None): ast.dump(node) for node in tree.body
        }
        found.append(([named[name] for name in names], [named.get(name) for name in reads]))
    classify, screen, generate, explain = found
    assert classify == screen == explain
    assert classify[0] == generate[0]
    assert generate[1] == [None, None]  # it reads no image


def curl(picture, url, cwd, **environment):
    command = ["bash", str(ROOT / "clients" / "curl.sh"), str(picture), url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env={**os.environ, **environment})


@pytest.mark.parametrize("answer", ["a page for 308", "a page for 413", "a page for 200"])
@pytest.mark.parametrize("path", ["/classify", "/generate"])
def test_the_curl_script_saves_no_page_and_says_the_status(tmp_path, picture_file, answer, path):
    status = ANSWERS[answer][0]
    with hostile_server(lambda n, body: None) as server:
        server.act = lambda n, body: (
            ANSWERS[answer] if server.requests[-1][0].startswith(path) else (200, {"Content-Type": "application/json"}, GOOD)
        )
        done = curl(picture_file, server.url, tmp_path, LIT_SERVER_API_KEY="secret")
    assert done.returncode == 1
    assert done.stderr.startswith(f"HTTP {status} (text/html)")
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr
    assert not list(tmp_path.glob("generated*"))
    assert all(headers["X-API-Key"] == "secret" for _, headers, _ in server.requests)


def test_the_curl_script_takes_any_name_and_tries_again(tmp_path):
    odd = tmp_path / os.fsdecode(b'-a;type=x,"q" caf\xe9.png')
    odd.write_bytes(PNG)

    def act(n, body):
        path = server.requests[-1][0]
        if n == 1:
            return "drop"
        if "stream" in path:
            return (200, {"Content-Type": "text/event-stream"}, b"event: done\ndata: {}\n\n")
        return None if "generate" in path else (200, {"Content-Type": "application/json"}, GOOD)

    with hostile_server(lambda n, body: None) as server:
        server.act = act
        done = curl(odd.name, server.url, tmp_path)
    assert done.returncode == 0, done.stderr
    bodies = [body for path, _, body in server.requests if path == "/classify"]
    assert bodies[1] == PNG
    assert PNG in bodies[2]
    assert (tmp_path / "generated-grid.png").read_bytes() == PNG
    assert "event: done" in done.stdout


@pytest.fixture
def endless(tmp_path):
    """Make and return what never ends: a pipe that nobody writes to, one below /dev, a socket, a device, a link to one."""
    with ExitStack() as stack:
        shm = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        link = tmp_path / "link.png"
        link.symlink_to("/dev/zero")
        for pipe in (tmp_path / "pipe", shm / "pipe"):
            os.mkfifo(pipe)
        bound = stack.enter_context(socket.socket(socket.AF_UNIX))
        bound.bind(str(shm / "socket"))
        pipes = {"a pipe": tmp_path / "pipe", "one in /dev/shm": shm / "pipe"}
        yield pipes | {"a socket": shm / "socket", "a device": "/dev/zero", "a link to a device": link}


@pytest.mark.parametrize("what", ["a pipe", "one in /dev/shm", "a socket", "a device", "a link to a device"])
@pytest.mark.parametrize("name", ["classify", "screen"])
def test_what_never_ends_keeps_no_client_waiting(run, picture_file, endless, name, what):
    with hostile_server(lambda n, body: None) as server:
        code, out, err, _ = run(name, endless[what], picture_file, "--url", server.url)
    assert code == 1
    assert "neither a file nor a folder" in out + err
    assert [path for path, *_ in server.requests] == ["/classify"]  # the image went


def test_a_full_disk_is_told_and_no_report_is_claimed(run, picture_file):
    with hostile_server(lambda n, body: None) as server:
        code, _, err, _ = run("screen", picture_file, "-o", "/dev/full", "--url", server.url)
    assert (code, "cannot write /dev/full: No space left" in err, "1 images" in err) == (1, True, False)


def shell(command, *arguments, **environment):
    """Run a command of bash with Python's own buffers; the arguments are $1 and so on."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", command, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=buffered | environment)


@pytest.mark.parametrize("name", ["classify", "screen"])
@pytest.mark.parametrize("read", ['<(cat "$4")', '/dev/stdin < <(cat "$4")', '/proc/self/fd/9 9< <(cat "$4")'])
def test_what_the_shell_hands_over_is_read(picture_file, name, read):
    with hostile_server(lambda n, body: None) as server:
        done = shell(f'"$1" "$2" --url "$3" {read}', sys.executable, ROOT / "clients" / f"{name}.py", server.url, picture_file)
    assert done.returncode == 0, done.stderr
    assert [body for _, _, body in server.requests] == [PNG]


@pytest.mark.parametrize("name", ["classify", "screen"])
def test_more_than_the_server_takes_is_not_sent(run, tmp_path, name):
    assert Limits.max_bytes == module_of(name).LARGEST
    for more in (0, 1):
        (tmp_path / f"{more}.png").write_bytes(PNG.ljust(Limits.max_bytes + more))
    with hostile_server(lambda n, body: None) as server:
        code, out, err, _ = run(name, tmp_path / "0.png", tmp_path / "1.png", "--url", server.url)
    assert code == 1
    assert f"the image has more than {Limits.max_bytes} bytes" in out + err
    assert [len(body) for _, _, body in server.requests] == [Limits.max_bytes]


KEYS = ["k\u00e9y", "a\nX-Other: b", "bell\a", "\udcff"]


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_no_header_can_carry_is_told_once(run, picture_file, monkeypatch, capsys, name, key):
    monkeypatch.setenv("LIT_SERVER_API_KEY", key)
    with hostile_server(lambda n, body: None) as server, pytest.raises(SystemExit) as ended:
        run(name, *arguments(name, picture_file), "--url", server.url)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("LIT_SERVER_API_KEY has characters that are not printable ASCII") == 1
    assert not server.requests


@pytest.mark.parametrize("key", KEYS)
def test_the_curl_script_takes_no_such_key(tmp_path, picture_file, key):
    with hostile_server(lambda n, body: None) as server:
        done = curl(picture_file, server.url, tmp_path, LIT_SERVER_API_KEY=key)
    assert (done.returncode, len(server.requests)) == (2, 0)
    assert done.stderr.startswith("LIT_SERVER_API_KEY has characters that are not printable ASCII")


def test_a_request_that_cannot_be_sent_is_not_tried_again():
    refused = pytest.raises(CLASSIFY.Refused, match="a request that cannot be sent")
    with hostile_server(lambda n, body: None) as server, httpx2.Client() as client, refused:
        CLASSIFY.ask(client, "GET", server.url, tries=2, headers={"X-API-Key": "a\nb"})


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(("to", "why"), [("> /dev/full", "No space left on device"), ("| sleep 0", "Broken pipe")])
def test_an_answer_that_cannot_be_written_is_told_and_ends_it(picture_file, name, to, why):
    """The pipe's reader is gone before the first answer: the server waits for it."""
    more = picture_file.with_name("b.png") if name in ("classify", "screen") else ""
    given = " ".join(map(str, (*arguments(name, picture_file), more)))
    picture_file.with_name("b.png").write_bytes(PNG)
    with hostile_server(lambda n, body: time.sleep(0.5)) as server:
        done = shell(
            f'"$1" "$2" {given} --url "$3" {to}; exit ${{PIPESTATUS[0]}}', sys.executable, ROOT / "clients" / f"{name}.py", server.url
        )
    assert done.returncode == 1
    assert done.stderr == f"cannot write standard output: {why}\n"
    assert len(server.requests) == (2 if name == "screen" else 1)  # it sends several at a time


def test_a_picture_that_cannot_be_saved_is_told(run, tmp_path):
    with hostile_server(lambda n, body: None) as server:
        code, _, err, _ = run("generate", "3", "-o", "/dev/full", "--url", server.url)
    assert (code, err) == (1, "cannot write /dev/full: No space left on device\n")
