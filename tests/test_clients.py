"""Tests of the clients, run as by a user, against a live server."""

import csv
import json
import re
import shutil
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from ebjdat_serve import pixels
from tests.conftest import ROOT, free_port


@pytest.fixture
def folder(tmp_path, test_images):
    home = tmp_path / "pictures"
    (home / "inner").mkdir(parents=True)
    for i, image in enumerate(test_images[0][::60]):
        (home / f"real{i}.png").write_bytes(pixels.encode_png(image))
    (home / "inner" / "broken.jpg").write_bytes(b"not an image")
    return home


def client(name, *arguments, cwd=None):
    command = [str(ROOT / "clients" / name)] if name.endswith(".sh") else [sys.executable, str(ROOT / "clients" / name)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def test_the_readmes_first_curl_finds_its_cat_and_gets_the_answer_that_stands_there(live):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^curl --data-binary @cat.png .*$", readme, re.M).group().replace("http://localhost:8000", live.url)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    said, shown = json.loads(done.stdout), json.loads(re.search(r"^# ({.class.:3.*})$", readme, re.M)[1].replace(", …", ""))
    assert (said["label"], said["suspicious"], said["model"]) == ("cat", False, shown["model"])
    for name in ("class", "label", "probability", "energy", "suspicion", "p_value", "suspicious", "alpha"):
        assert said[name] == (pytest.approx(shown[name], abs=1e-3) if isinstance(shown[name], float) else shown[name]), name
    with Image.open(ROOT / "cat.png") as cat:
        assert "AI-generated" in cat.text["Source"]


def test_classify(live, folder):
    done = client("classify.py", folder / "real0.png", folder / "real1.png", "--url", live.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("energy") == 2
    bad = client("classify.py", folder / "real0.png", folder / "inner" / "broken.jpg", folder / "absent.png", "--url", live.url)
    assert bad.returncode == 1
    assert "not an image" in bad.stderr
    assert "absent.png" in bad.stderr


def test_screen_writes_every_file_the_worst_first_and_a_sheet_of_thumbnails(live, folder, tmp_path):
    report, sheet = tmp_path / "report.csv", tmp_path / "sheet.html"
    (folder / "white & square.png").write_bytes(pixels.encode_png(np.full((32, 32, 3), 255, np.uint8)))
    done = client("screen.py", folder, "-o", report, "--sheet", sheet, "--url", live.url)
    (folder / "white & square.png").unlink()
    with report.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    assert rows[0]["file"].endswith("white & square.png")
    assert (rows[0]["suspicious"], rows[0]["why"], rows[0]["decision"]) == ("True", "statistics", "review")
    assert rows[0]["reasons"].split()[0] == "ood"
    assert sum(bool(row["error"]) for row in rows) == 1
    assert done.returncode == 1  # one was refused
    answered = [row for row in rows if not row["error"]]
    assert all(0 < float(row[name]) <= 1 for row in answered for name in ("p_value", "margin_p_value"))
    assert all((row["decision"] == "review") == bool(row["reasons"]) for row in answered)
    kinds = [1 if row["error"] else 0 if row["decision"] == "review" or row["suspicious"] == "True" else 2 for row in rows]
    assert kinds == sorted(kinds)
    page = sheet.read_text(encoding="utf-8")
    assert page.count("<figure") == 11
    assert page.count('class="bad"') == sum(kind < 2 for kind in kinds)
    assert page.index("white &amp; square.png") < page.index("not an image")
    first = re.search(r'src="([^"]+)"', page)[1]
    assert (tmp_path / urllib.parse.unquote(first)).resolve() == (folder / "white & square.png").resolve()


def test_screen_tells_suspicious_by_its_exit_code(live, folder, tmp_path):
    quiet = client("screen.py", f"{folder}/real*.png", "--url", live.url)
    rows = csv.DictReader(quiet.stdout.splitlines())
    flagged = [row for row in rows if row["suspicious"] == "True" or row["decision"] == "review"]
    assert quiet.returncode == (3 if flagged else 0)
    assert client("screen.py", tmp_path / "nothing*.png", "--url", live.url).returncode == 1


def test_generate(live, tmp_path):
    done = client("generate.py", "3", "-n", "4", "--steps", "3", "--seed", "1", "-o", tmp_path / "out.png", "--url", live.url)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert np.asarray(picture).std() > 5
    wrong = client("generate.py", "catt", "-o", tmp_path / "no.png", "--url", live.url)
    assert wrong.returncode == 1
    assert "unknown" in wrong.stderr
    assert not (tmp_path / "no.png").exists()


def test_explain(live, folder, tmp_path):
    done = client("explain.py", folder / "real0.png", "--scale", "2", "-o", tmp_path / "why.png", "--url", live.url)
    assert done.returncode == 0, done.stderr
    assert re.search(r"why.png: \w+ -> \w+: probability 0\.\d+, l2 \d\.\d+, l-inf 0\.\d+$", done.stdout.strip())
    with Image.open(tmp_path / "why.png") as strip:
        assert strip.size == (192, 64)
    none = client("explain.py", folder / "real0.png", "--to", "8", "--radius", "0.01", "-o", tmp_path / "none.png", "--url", live.url)
    assert none.returncode == 3
    assert "-> ship was not found; the last that was tried: probability" in none.stdout
    wrong = client("explain.py", folder / "real0.png", "--to", "catt", "-o", tmp_path / "no.png", "--url", live.url)
    assert wrong.returncode == 1
    assert "to 'catt' is unknown" in wrong.stderr
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("classify.py", ["real0.png"]), ("screen.py", ["real0.png"]), ("generate.py", ["3"]), ("explain.py", ["real0.png"])],
)
def test_without_a_server_they_say_how_to_start_one(folder, name, arguments):
    done = client(name, *arguments, "--url", f"http://127.0.0.1:{free_port()}", cwd=folder)
    assert done.returncode == 2
    assert "make serve" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_curl_script(live, folder, tmp_path):
    done = client("curl.sh", folder / "real0.png", f"{live.url}/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"energy"') >= 4
    assert (tmp_path / "generated-grid.png").stat().st_size > 1000


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_script_of_the_browser_page_is_javascript(tmp_path):
    """A quote within a quote kept the page from starting, which only the tests in a browser would have seen."""
    page = (ROOT / "clients" / "browser" / "index.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script type=.module.>(.*?)</script>", page, re.S)
    (tmp_path / "page.mjs").write_text(script, encoding="utf-8")
    done = subprocess.run(["node", "--check", str(tmp_path / "page.mjs")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
