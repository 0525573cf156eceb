"""Tests of offline operation: serving makes no DNS lookup, leaves no file, and its pages load nothing from elsewhere."""

import ast
import os
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest

from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import ROOT, serving

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
COLLECTOR = "mobile.events.data.microsoft.com"
RECORDER = r"""
/* Every look-up of a name, and every packet or connection to another machine, is a line in the file $EBJDAT_LOOKUPS. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const char *name) {
    int file = open(getenv("EBJDAT_LOOKUPS"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    dprintf(file, "%d %s %s\n", getpid(), call, name);
    close(file);
}
static void note_address(const char *call, const struct sockaddr *to) {
    char text[INET6_ADDRSTRLEN] = "";
    if (to && to->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)to;
        if ((ntohl(in->sin_addr.s_addr) >> 24) == 127) return;
        inet_ntop(AF_INET, &in->sin_addr, text, sizeof text);
    } else if (to && to->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const void *)to;
        if (IN6_IS_ADDR_LOOPBACK(&in->sin6_addr)) return;
        inet_ntop(AF_INET6, &in->sin6_addr, text, sizeof text);
    } else return;
    note(call, text);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    char number[16];
    if (node && inet_pton(AF_INET, node, number) != 1 && inet_pton(AF_INET6, node, number) != 1) note("getaddrinfo", node);
    return REAL(getaddrinfo)(node, service, hints, found);
}
struct hostent *gethostbyname(const char *name) { note("gethostbyname", name); return REAL(gethostbyname)(name); }
struct hostent *gethostbyname2(const char *name, int family) { note("gethostbyname2", name); return REAL(gethostbyname2)(name, family); }
int gethostbyname_r(const char *name, struct hostent *host, char *buffer, size_t length, struct hostent **found, int *error) {
    note("gethostbyname_r", name);
    return REAL(gethostbyname_r)(name, host, buffer, length, found, error);
}
int connect(int file, const struct sockaddr *to, socklen_t length) { note_address("connect", to); return REAL(connect)(file, to, length); }
ssize_t sendto(int file, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length) {
    note_address("sendto", to);
    return REAL(sendto)(file, data, size, flags, to, length);
}
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    """A library that, preloaded, records look-ups of every process, in C as well as in Python."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler, to record the look-ups of compiled code: apt-get install gcc libc6-dev")
    home = tmp_path_factory.mktemp("recorder")
    (home / "recorder.c").write_text(RECORDER, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(home / "recorder.so"), str(home / "recorder.c"), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the C compiler cannot build the recorder: {built.stderr[-300:]}")
    return home / "recorder.so"


def empty_machine(tmp_path: Path, recorder: Path) -> dict[str, str]:
    """Return what to set so that a process has an empty HOME and an empty TMPDIR, and its look-ups are recorded."""
    for name in ("home", "tmp", "cwd"):
        (tmp_path / name).mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "LD_PRELOAD": str(recorder),
        "EBJDAT_LOOKUPS": str(tmp_path / "lookups"),
    }


# ONNX Runtime reports nothing where it finds itself in a CI job (or a unit test): here it must, or the recorder proves nothing
CI_JOB = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS", "JENKINS_URL", "CODEBUILD_BUILD_ID", "BUILDKITE",
          "TEAMCITY_VERSION", "APPVEYOR", "ORT_RUNNING_UNIT_TESTS")  # fmt: skip


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def lookups(tmp_path: Path) -> str:
    file = tmp_path / "lookups"
    return file.read_text(encoding="utf-8") if file.exists() else ""


@pytest.mark.slow
def test_serving_looks_up_no_name_and_leaves_no_file(recorder, tmp_path, picture, monkeypatch):
    """Beside a process that has ONNX Runtime's telemetry on, which shows what would be seen, and how long that takes."""
    (tmp_path / "talking").mkdir()
    for name in CI_JOB:
        monkeypatch.delenv(name, raising=False)
    talking = {**os.environ, **empty_machine(tmp_path / "talking", recorder), "ORT_DISABLE_TELEMETRY": "0"}
    script = "import time, onnxruntime as ort, sys; ort.InferenceSession(sys.argv[1]); time.sleep(120)"
    witness = subprocess.Popen([sys.executable, "-c", script, str(SHIPPED / "classify.onnx")], env=talking)
    try:
        for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in empty_machine(tmp_path, recorder).items():
            monkeypatch.setenv(name, value)
        with serving(SHIPPED, tmp_path / "cwd" / "log") as server:
            assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200
            assert httpx2.post(f"{server.url}/energy", files={"image": picture}).status_code == 200
            assert httpx2.get(f"{server.url}/generate", params={"class": 3, "steps": 2}).status_code == 200
            for path in ("/info", "/docs", "/redoc", "/openapi.json", "/health"):
                assert httpx2.get(server.url + path).status_code == 200
            end = time.monotonic() + 60
            while COLLECTOR not in lookups(tmp_path / "talking") and time.monotonic() < end and witness.poll() is None:
                time.sleep(0.1)
            assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200
    finally:
        witness.kill()
        witness.wait()
    assert COLLECTOR in lookups(tmp_path / "talking"), "this ONNX Runtime reports nothing: the recorder proves nothing here"
    assert any("deviceid" in name for name in left(tmp_path / "talking" / "home"))
    assert lookups(tmp_path) == ""
    assert left(tmp_path / "home") == []
    assert left(tmp_path / "tmp") == []
    assert left(tmp_path / "cwd") == ["log"]


def test_the_recorder_sees_every_way_of_asking(recorder, tmp_path):
    script = (
        "import contextlib, ctypes, socket\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('name.invalid', 80)\n"
        "ctypes.CDLL(None).gethostbyname(b'old.invalid')\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "with contextlib.suppress(OSError): s.sendto(b'', ('192.0.2.1', 9))\n"
        "with contextlib.suppress(OSError): s.connect(('192.0.2.2', 9))\n"
        "s.connect(('127.0.0.1', 9))\n"
    )
    environment = {**os.environ, **empty_machine(tmp_path, recorder)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    seen = lookups(tmp_path)
    for call in ("getaddrinfo name.invalid", "gethostbyname old.invalid", "sendto 192.0.2.1", "connect 192.0.2.2"):
        assert call in seen
    assert "127.0.0.1" not in seen


def users_of_onnxruntime() -> list[str]:
    """Return every module of ours that imports ONNX Runtime, however deep in it."""
    found = []
    for folder in ("ebjdat_serve", "training", "export", "benchmarks", "clients"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            names: set[str] = set()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(node.module or "")
            if any(name.partition(".")[0] == "onnxruntime" for name in names):
                found.append(".".join(file.relative_to(ROOT).with_suffix("").parts))
    return found


@pytest.mark.parametrize("module", users_of_onnxruntime())
def test_telemetry_is_off_before_anything_imports_onnx_runtime(module):
    """It writes and reports from its import on."""
    script = (
        f"import os, sys\n"
        f"class Catch:\n"
        f"    def find_spec(self, name, *_):\n"
        f"        if name == 'onnxruntime':\n"
        f"            print(os.environ.get('ORT_DISABLE_TELEMETRY'), flush=True)\n"
        f"            os._exit(0)\n"
        f"sys.meta_path.insert(0, Catch())\n"
        f"import {module}\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(("given", "then"), [(None, "1"), ("", "1"), ("0", "0"), ("1", "1")])
def test_telemetry_is_off_unless_it_is_asked_for(given, then):
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    said = subprocess.run(
        [sys.executable, "-c", "import ebjdat_serve, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == then
    assert "ENV ORT_DISABLE_TELEMETRY=1" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


class Addresses(HTMLParser):
    """Whatever a page loads or refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "spec-url", "action", "data") and value]

    def handle_data(self, data):
        self.text.append(data)


def test_the_documentation_pages_load_from_this_server_alone(live):
    url = live.url
    host = urlsplit(url).netloc
    for path in ("/docs", "/redoc"):
        page = httpx2.get(url + path)
        assert page.status_code == 200
        parsed = Addresses()
        parsed.feed(page.text)
        assert len(parsed.found) >= 2
        for address in parsed.found:
            whole = urljoin(url + path, address)
            assert urlsplit(whole).netloc == host, f"{path} loads {address}"
            answer = httpx2.get(whole)
            assert answer.status_code == 200, whole
            assert answer.content
        assert "://" not in "".join(parsed.text), path  # in scripts of the page itself
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not any(word.startswith(("http:", "https:", "*", "//")) for part in policy.split(";") for word in part.split())
    assert httpx2.get(f"{url}/openapi.json").json()["paths"].keys() >= {"/classify", "/energy", "/generate"}
    assert httpx2.get(f"{url}/docs/oauth2-redirect").status_code == 404


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs a Chromium at {CHROMIUM}: apt-get install chromium, or set CHROMIUM to another")
@pytest.mark.parametrize(("path", "drawn"), [("/docs", 'data-path="/classify"'), ("/redoc", "operation/classify_classify_post")])
@pytest.mark.slow
def test_a_browser_draws_the_documentation(live, tmp_path, path, drawn):
    """With their policy in force, and nothing but this server to ask."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    only_us = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    done = subprocess.run([*command, only_us, "--dump-dom", live.url + path], capture_output=True, text=True, timeout=180, check=True)
    assert drawn in done.stdout
