"""Tests of a run's output: the log, the report, TensorBoard, the list of presets."""

import base64
import html
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT
from training.data.datasets import load
from training.loop.clock import Clock
from training.loop.loop import train
from training.presets import DIGITS
from training.report import series, write_report


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "digits"
    chains = replace(DIGITS.method.chains, batch=8, buffer_size=96, steps=2)
    preset = replace(DIGITS, epochs=2.5, method=replace(DIGITS.method, chains=chains))
    train(preset, load("digits"), folder, init=None, clock=Clock(), device=torch.device("cpu"), tensorboard=True)
    write_report(folder, preset)
    return folder


def test_the_report_is_one_file_with_curves_histograms_and_samples(stage):
    report = (stage / "report.html").read_text()
    for said in ("Held-out training images: clean", "rolled back for divergence 0 times"):
        assert said in report
    assert len(re.findall(r"data:image/png;base64,", report)) == 3
    curves, histograms = (base64.b64decode(content).decode() for content in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", report))
    for said in (">Loss<", ">Energy gaps, nats<", ">Accuracy on held-out training images<"):
        assert said in curves
    last = [row["loss"] for row in map(json.loads, (stage / "log.jsonl").read_text().splitlines()) if "loss" in row][-1]
    assert f">loss {last:.4g}<" in curves
    for said in (">step 17<", ">step 34<", ">step 43<", ">clean<", ">adversarial<", ">drawn<"):
        assert said in histograms
    assert set(re.findall(r'(?:src|href)="([^"]{5})', report)) == {"data:"}
    for image in (curves, histograms):
        assert not re.search(r'href="[^#]|@import|url\([^#]', image)
    assert '"kind": "EbJdat"' in html.unescape(report)


def test_what_a_name_says_is_text_in_the_report(tmp_path):
    folder = tmp_path / "<b>&"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 20, "of": 60, "loss": 1.0}')
    report = write_report(folder).read_text()
    assert "<h1>&lt;b&gt;&amp;</h1>" in report
    assert "<b>" not in report


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["jinja2", "matplotlib"])
def test_without_its_libraries_there_is_a_note_and_no_report(stage, tmp_path, absent):
    (tmp_path / "log.jsonl").write_bytes((stage / "log.jsonl").read_bytes())
    code = f"import sys; sys.modules[{absent!r}] = None; from pathlib import Path; from training.report import write_report; "
    code += f"assert write_report(Path({str(tmp_path)!r})) is None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"no report.html: {absent} is not installed: .* -m pip install -e .*\[train\]'?, then .*\n", done.stderr)
    assert not (tmp_path / "report.html").exists()


def test_the_log_holds_curves_looks_and_histograms(stage):
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "selection_clean" in row] == [17, 34, 43]
    shown = [row["histograms"] for row in rows if "histograms" in row][-1]
    for name in ("clean", "adversarial", "drawn"):
        assert sum(shown[name]) == pytest.approx(1.0, abs=0.01)


def test_tensorboard_has_the_scalars_and_the_sheets(stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    assert {"loss", "selection_pgd10", "energy_gap_adv"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("samples")] == [17, 34, 43]


def test_a_step_taken_twice_counts_once_and_what_diverged_does_not_count(tmp_path):
    rows = [{"step": 20, "of": 60, "loss": 1.0}, {"step": 25, "diverged": 1, "loss": float("nan")}, {"step": 20, "of": 60, "loss": 0.5}]
    assert series(rows, "loss") == [(20.0, 0.5)]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 4')
    report = write_report(tmp_path).read_text()
    assert "Step 20 of 60, rolled back for divergence 1 times" in report


@pytest.mark.slow
def test_the_report_also_runs_alone_and_says_what_it_wants(stage, tmp_path):
    script = [sys.executable, str(ROOT / "training" / "report.py")]
    assert subprocess.run([*script, str(stage)], capture_output=True, text=True, check=True).stdout.strip().endswith("report.html")
    done = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds no log.jsonl" in done.stderr


@pytest.mark.slow
def test_help_shows_presets_with_numbers_and_durations():
    said = subprocess.run(
        [sys.executable, str(ROOT / "training" / "train.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"cifar10-small +clean 0\.\d+, PGD-20 8/255 0\.\d+ \(the bundled model\); about 15 hours on one core", said)
    for method in ("trades", "jem++", "ebjdat-paper", "dat"):
        assert re.search(rf"^  {re.escape(method)} +clean 0?\.\d+", said, re.M), method
