"""Tests of the benchmarks' own logic: output files, and missing engines or time."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import benchmarks.engines as engines
from benchmarks import equal_budget, explanations, gpu_check, gpu_parallel, load, priors, tables
from benchmarks.public_nets import KNOWN
from ebjdat_serve.bundle import write_rows
from ebjdat_serve.errors import EngineError
from ebjdat_serve.rows import Images, first, parse_rows, rows_where
from tests.conftest import ROOT
from training.config import describe
from training.evaluation.rows import number
from training.overrides import override
from training.presets import PRESETS, preset


def test_the_documents_tables_are_those_of_the_json(shipped):
    rows = json.loads((ROOT / "benchmarks" / "engines.json").read_text())
    text = (ROOT / "docs" / "engines.md").read_text()
    assert engines.document(text, rows, shipped) == text


def test_the_tables_of_serving_are_those_of_the_json():
    text = (ROOT / "docs" / "serving.md").read_text()
    assert tables.serving(text) == text


def test_the_tables_of_the_evaluation_are_those_of_the_json():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert tables.evaluation(text) == text, "run python benchmarks/tables.py"


def test_the_table_of_explanations_is_that_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "explanations.json").read_text())
    text = (ROOT / "docs" / "explanations.md").read_text()
    assert explanations.document(text, rows) == text
    strip = ROOT / "docs" / "explanations.png"
    assert b"trainedAlgorithmicMedia" in strip.read_bytes()
    assert strip.stat().st_size < 150_000


def test_the_table_of_priors_is_that_of_the_json():
    rows = json.loads((ROOT / "benchmarks" / "priors.json").read_text())
    text = (ROOT / "docs" / "import.md").read_text()
    assert priors.document(text, rows) == text
    assert {row["model"] for row in rows} == set(priors.SUBJECTS)
    assert b"trainedAlgorithmicMedia" in (ROOT / "docs" / "priors.png").read_bytes()


def test_our_attacks_land_on_the_known_figures_of_the_public_nets():
    rows = {row["name"]: row["value"] for row in json.loads((ROOT / "benchmarks" / "public_nets.json").read_text())}
    for name, (clean, apgd) in KNOWN.items():
        assert rows[f"accuracy_clean {name}"] == clean
        assert rows[f"accuracy_apgd {name}"] <= apgd
        assert rows[f"accuracy_autoattack {name}"] == rows[f"accuracy_autoattack_torchattacks {name}"]


def test_other_libraries_say_the_same():
    rows = json.loads((ROOT / "benchmarks" / "crosscheck.json").read_text())
    assert {row["library"].split(",")[0] for row in rows} == {"scikit-learn", "pytorch-ood", "torchmetrics", "counted by hand"}
    for row in rows:
        assert row["ours"] == pytest.approx(row["value"], abs=2e-5), row["name"]


def test_the_walk_tells_fooled_images_from_clean_ones_as_well_as_it_must_and_better_than_max_softmax():
    rows = [tables.parsed(row) for row in json.loads((ROOT / "benchmarks" / "reach.json").read_text())]
    assert len({row.key for row in rows}) == len(rows)
    for eps, bar in ((8 / 255, 0.77), (4 / 255, 0.83)):
        found = {row.score: row.value for row in rows_where(rows, "reach_auroc", attack="pgd", eps=eps)}
        assert found["reach_score"] >= max(bar, found["max_softmax"], found["margin"])
    for row in rows_where(rows, "review_share", attack=None):
        low, high = row.expected
        assert low <= row.value <= high


def test_what_rejection_gives_against_an_attack_that_knows_it_is_no_more_than_the_radius_of_its_search():
    """Far more would show a weak attack, not a strong defence."""
    rows = [tables.parsed(row) for row in json.loads((ROOT / "benchmarks" / "reach.json").read_text())]
    for row in rows_where(rows, "accuracy_with_search"):
        less = first(rows, "accuracy_less_radius", radius=row.radius)
        assert row.n == less.n >= 200
        assert row.value <= less.interval[1]


def test_each_process_has_a_core_of_its_own():
    """A child inherits its parent's one core: it must be put on another all the same."""
    if len(load.CORES) < 2:
        pytest.skip("one core")
    code = "import os, sys; print(sorted(os.sched_getaffinity(0)))"
    before = os.sched_getaffinity(0)
    try:
        load.pin(1)
        done = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: load.pin(0), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [load.CORES[0]]
        assert os.sched_getaffinity(0) == {load.CORES[1]}
    finally:
        os.sched_setaffinity(0, before)


def test_a_road_that_cannot_step_is_listed_with_its_reason(shipped, monkeypatch):
    from ebjdat_serve.engines.ort import OnnxEngine

    def broken(self, chains, steps):
        raise EngineError("no step here")

    monkeypatch.setattr(OnnxEngine, "advance", broken)
    found, missing = engines.roads(shipped, [("onnx", "cpu", "fp32"), ("torch", "cpu", "fp32"), ("onnx", "cpu", "bf16")])
    assert list(found) == ["torch cpu fp32"]
    assert [(row["name"], row["unit"]) for row in missing] == [("onnx cpu fp32", "unmeasured"), ("onnx cpu bf16", "unmeasured")]
    assert missing[0]["why"] == "no step here"


def test_gpu_check_names_what_there_was_no_time_for_and_writes_the_rest(monkeypatch):
    asked = []

    def measure(bundle, batches, roads, device, seconds):
        asked.append([road[1] for road in roads])
        label = "torch cuda fp32 step batch 1"
        return [
            {"name": label, "value": 100.0, "unit": "chain steps/s", "ms": 10.0},
            {"name": f"ratio {label} / eager torch fp32", "value": 5.0, "unit": "ratio"},
            {"name": f"ratio floor / {label}", "value": 0.4, "unit": "ratio"},
        ]

    monkeypatch.setattr(engines, "measure", measure)
    monkeypatch.setattr(engines, "random_bundle", lambda folder, depth, width: None)
    rows = [row for block in gpu_check.measured(time.monotonic() + 200) for row in block]
    assert asked == [["cuda"] * 4, ["cuda"] * 4, ["tensorrt"] * 2]
    report = gpu_check.document("a GPU", rows, ["Tests: none"])
    assert "| WRN-28-10 torch cuda fp32 step batch 1 | 100 | chain steps/s | 10.00 | 5.00 |  | 0.40 |" in report
    assert "unmeasured: WRN-28-10 onnx tensorrt fp16: 240 s were not left" in report
    assert len({row["name"] for row in rows if row["unit"] == "chain steps/s"}) == 2


def test_one_cpu_thread_is_timed_by_the_cpus_time():
    assert torch.get_num_threads() == 1
    assert engines.clock(torch.device("cpu")) is time.process_time
    assert engines.clock(torch.device("cuda")) is time.perf_counter


def test_gpu_check_does_not_pass_where_its_tests_cannot_run(monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "sklearn" else name)
    assert gpu_check.tests(time.monotonic() + 60) == (False, ["Tests marked gpu: not run, sklearn not installed here."])


@pytest.mark.parametrize(("out", "err", "said"), [("", "ImportError: no torch\n", "ImportError: no torch"), ("", "", "ended with 4")])
def test_gpu_check_tells_of_tests_that_said_nothing(monkeypatch, out, err, said):
    """A conftest that cannot be imported leaves the output empty, which was an IndexError."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 4, out, err))
    passed, (line,) = gpu_check.tests(time.monotonic() + 60)
    assert not passed
    assert said in line


ABSENT = "httpx2 litserve tqdm fastapi starlette uvicorn onnx onnxscript onnxruntime cryptography matplotlib pyautoattack prometheus_client"
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import benchmarks.gpu_check, benchmarks.engines, pytest
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_gpu.py"]))
"""


def test_gpu_check_and_the_tests_marked_gpu_need_nothing_of_the_server():
    """A machine with a GPU has torch, NumPy, Pillow and safetensors, and what was carried to it."""
    done = subprocess.run([sys.executable, "-c", BARE, ABSENT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout


def test_gpu_check_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--write", "never.md"])
    assert gpu_check.main() == 2
    assert "there is none here" in capsys.readouterr().err
    assert not Path("never.md").exists()


def test_every_entry_at_equal_budget_is_a_run_that_the_trainer_takes():
    models = ROOT / "benchmarks" / "models"
    ran_once = {folder.name.removeprefix(equal_budget.PREFIX) for folder in models.glob("wrn28-*")}
    assert len(ran_once) == 10
    assert ran_once <= set(equal_budget.ENTRIES)
    for name, entry in equal_budget.ENTRIES.items():
        stage = PRESETS[entry.method] if entry.method in PRESETS else preset(entry.method, "small", "cifar10")
        taken = override(stage, ["depth=28", "width=2", "epochs=1.5", *entry.settings])  # raises for a field that is none
        assert taken.ema == 0.999, name
        assert entry.init in ("", *equal_budget.ENTRIES)
        if name in ran_once:  # the entry is what was run
            ran = json.loads((models / f"{equal_budget.PREFIX}{name}" / "config.json").read_text())["stages"][-1]
            epochs = entry.epochs or equal_budget.BUDGET / entry.passes
            assert describe(override(stage, ["depth=28", "width=2", f"epochs={epochs:.2f}", *entry.settings])) == ran, name


def test_rows_at_equal_budget_stand_beside_their_paired_difference(tmp_path):
    def keep(name, good, n):
        folder = tmp_path / f"{equal_budget.PREFIX}{name}"
        folder.mkdir()
        images = Images(dataset="cifar10", split="test", attack="pgd", norm="linf", eps=8 / 255)
        row = number("accuracy_pgd20", float(np.mean(good)), n, images, "")
        write_rows(folder / "metrics.json", [row])
        np.savez(folder / "images.npz", **{row.key: np.array(good, bool)})

    control = [1] * 60 + [0] * 40
    keep("pgd7", control, 100)
    keep("trades", [1] * 70 + [0] * 30, 100)
    keep("dat", control[:50], 50)  # of other images: no pair
    head, _, *lines = equal_budget.table(tmp_path)
    cells = {line.split(" | ")[0].strip("| "): [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines}
    at = [name.strip() for name in head.strip("|").split(" | ")].index("minus control, paired")
    half = 1.96 * (0.1 * 0.9) ** 0.5 / 10
    assert cells["trades"][at] == f"+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}]"
    assert cells["pgd7"][at] == cells["dat"][at] == ""


def test_the_table_of_equal_budget_is_that_of_the_kept_rows():
    text = (ROOT / "docs" / "equal_budget.md").read_text()
    assert "\n".join(equal_budget.table(ROOT / "benchmarks" / "models")) in text


def test_the_robustness_measured_on_a_gpu_is_that_of_the_kept_per_image_results():
    files = {name: ROOT / "benchmarks" / "models" / name / "gpu_images.npz" for name in ("ebjdat", "fgsm-rs", "pgd-at")}
    results = {name: dict(np.load(file)) for name, file in files.items()}
    file = ROOT / "benchmarks" / "gpu_robustness.json"
    rows = {model: parse_rows(of_model, file) for model, of_model in json.loads(file.read_text()).items()}
    assert set(rows) == set(files)
    for model, of_model in rows.items():
        shares = [row for row in of_model if row.metric != "autoattack_warnings"]
        assert shares
        for row in shares:
            good = results[model][row.key]
            assert (len(good), good.mean()) == (row.n, pytest.approx(row.value)), row.metric
    text = (ROOT / "docs" / "gpu.md").read_text()
    for said, metric in (
        ("PGD-20 on cross-entropy", "accuracy_pgd20"),
        ("PGD-20 on the margin, 5 starts", "accuracy_pgd20_restarts"),
        ("APGD-CE and APGD-T", "accuracy_apgd"),
    ):
        (row,) = rows_where(rows["ebjdat"], metric, norm="linf", eps=8 / 255)
        key = row.key
        shares = [results[name][key].mean() for name in files]
        digits = 4 if said == "PGD-20 on cross-entropy" else 3
        cells = [said, *(f"{share:.{digits}f}" for share in shares), equal_budget.difference(files["ebjdat"], files["fgsm-rs"], key)]
        assert f"| {' | '.join(cells)} | {len(results['ebjdat'][key]):,} |" in text


def test_an_entry_keeps_what_was_measured_of_itself(tmp_path, monkeypatch):
    plan = equal_budget.Plan(tmp_path, 56, (10, 1), (), 1.0, time.monotonic() + 60)
    weights = tmp_path / "runs" / "pgd7" / "small-pgd-at" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    for file in (weights.parent / "log.jsonl", weights.parent.parent / "config.json"):
        file.write_text("{}")
    save_file({"w": torch.ones(2)}, weights)

    def call(plan, words, name, what):
        folder = Path(words[words.index("--folder") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(name))

    monkeypatch.setattr(equal_budget.Plan, "call", call)
    for stale in ("pgd7-seed1", "pgd7-other"):  # of a name that begins alike
        (tmp_path / "measured" / stale).mkdir(parents=True)
        (tmp_path / "measured" / stale / "metrics.json").write_text(json.dumps(stale))
    plan.evaluate("pgd7")
    assert json.loads((tmp_path / "kept" / "wrn28-pgd7" / "metrics.json").read_text()) == "pgd7"
    assert load_file(tmp_path / "kept" / "wrn28-pgd7" / "weights.safetensors")["w"].dtype == torch.float16


def test_rows_of_another_plan_are_not_taken_for_this_ones(tmp_path):
    plan = equal_budget.Plan(tmp_path, 56, (10, 1), (), 1.0, 0.0)
    plan.claim()
    plan.claim()  # the same goes on
    with pytest.raises(ValueError, match="rows of another plan"):
        replace(plan, passes=28).claim()


def test_a_folder_without_rows_has_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["equal_budget.py", str(tmp_path), "--table"])
    with pytest.raises(SystemExit):
        equal_budget.main()
    assert "holds no wrn28-NAME/metrics.json" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_share_a_gpu_are_compared_with_one_alone(tmp_path, monkeypatch, capsys):
    words = ["gpu_parallel.py", "--network", "10", "1", "--batch", "8", "--seconds", "0.2", "--start", "0.01"]
    monkeypatch.setattr(sys, "argv", [*words, "--processes", "2"])
    with pytest.raises(SystemExit):
        gpu_parallel.main()
    assert "must begin with 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--processes", "1"])
    assert gpu_parallel.main() == 1  # it was not ready within a hundredth of a second
    assert "of 1 processes 1 failed" in capsys.readouterr().err
