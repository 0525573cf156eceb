"""First contact with a GPU: what goes wrong in a step is said, keeps what was measured, and stops no other step."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Step
from ebjdat_serve.bundle import Bundle
from tests.conftest import ROOT, SHIPPED, until
from training.data.datasets import data_root
from training.loop.state import load_position

ROW = {"name": "torch cuda fp32 classify batch 1", "value": 2.0, "unit": "images/s", "network": "WRN-16-2"}


def writes(file, then=""):
    """Return a command that writes one row, and then does something."""
    return "-c", f"import json, time; open({str(file)!r}, 'w').write(json.dumps([{ROW}])); {then}", "--json", str(file)


def done(monkeypatch, out, *steps, minutes="1"):
    """Return the status of gpu-check with these steps, and its results."""
    monkeypatch.setattr(gpu_check, "steps", lambda out, rehearsal: list(steps))
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", "--out", str(out), "--minutes", minutes])
    return gpu_check.main(), json.loads((out / "gpu.json").read_text())


def by_name(found):
    return {step["name"]: step for step in found["steps"]}


def test_whatever_a_step_does_the_next_is_taken_and_nothing_measured_is_lost(monkeypatch, tmp_path, capsys):
    hangs = tmp_path / "hangs.json"
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    status, found = done(
        monkeypatch,
        tmp_path,
        Step("hangs", (writes(hangs, "time.sleep(60)"),), 3),
        Step("fails", (("-c", "raise ValueError('no kernel image')"), writes(tmp_path / "never.json")), 20),
        Step("killed", (("-c", "import os; os.kill(os.getpid(), 9)"),), 20),
        Step(
            "garbage",
            (("-c", f"open({str(tmp_path / 'garbage.json')!r}, 'w').write('[{{')", "--json", str(tmp_path / "garbage.json")),),
            20,
        ),
        Step("lacks", (("-c", "pass"),), 20, ("no_such_package",)),
        Step("fine", (writes(tmp_path / "fine.json"),), 20),
    )
    steps = by_name(found)
    assert status == 1
    assert {name: step["status"] for name, step in steps.items()} == {
        **{"hangs": "stopped", "fails": "failed", "killed": "failed"},
        **{"garbage": "passed", "lacks": "not run", "fine": "passed"},
    }
    assert steps["fails"]["said"] == "status 1: ValueError: no kernel image"
    assert steps["killed"]["said"].startswith("status -9")
    assert steps["lacks"]["said"] == "no_such_package not installed here"
    assert [row["step"] for row in found["rows"]] == ["hangs", "fine"]
    assert steps["hangs"]["seconds"] < 12
    assert "stopped  hangs" in (said := capsys.readouterr().out) and "not run  lacks" in said


def test_what_an_earlier_run_left_is_no_result_of_this_one(monkeypatch, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps([ROW]))
    _, found = done(monkeypatch, tmp_path, Step("fails", (("-c", "raise SystemExit(3)", "--json", str(tmp_path / "old.json")),), 20))
    assert found["rows"] == []


def test_a_run_that_is_cut_off_keeps_its_rows_and_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    then = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import sys
from benchmarks import gpu_check
from benchmarks.gpu_check import Step
gpu_check.steps = lambda out, rehearsal: [Step("long", ({writes(tmp_path / "long.json", then)},), 60), Step("never", (("-c", "pass"),), 60)]
sys.argv = ["gpu_check.py", "--rehearse", "--out", {str(tmp_path)!r}]
sys.exit(gpu_check.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until(lambda: pid.exists() and pid.read_text() and json.loads((tmp_path / "gpu.json").read_text())["rows"], 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(step["name"], step["status"], step["said"]) for step in found["steps"]] == [
        ("long", "running", "cut off"),
        ("never", "not run", "not begun"),
    ]
    assert [row["step"] for row in found["rows"]] == ["long"]
    until(lambda: not Path(f"/proc/{pid.read_text()}").exists(), 10)


def test_tests_that_were_all_skipped_show_nothing(monkeypatch, tmp_path):
    said = "print('SKIPPED [3] tests/test_gpu.py:30: no GPU'); print('3 skipped in 0.1s')"
    for name in ("tests", "other tests"):
        status, found = done(monkeypatch, tmp_path, Step(name, (("-c", said),), 20, shows=" passed"))
        step = by_name(found)[name]
        assert (status, step["status"], step["skipped"], step["said"]) == (1, "failed", ["no GPU"], "3 skipped in 0.1s")
    status, found = done(monkeypatch, tmp_path, Step("tests", (("-c", "print('2 passed, 1 skipped in 0.1s')"),), 20, shows=" passed"))
    assert (status, by_name(found)["tests"]["status"]) == (0, "passed")
    assert [step.name for step in gpu_check.steps(tmp_path, rehearsal=False) if step.shows] == ["tests"]


@pytest.mark.parametrize(("optional", "status"), [(True, 0), (False, 1)])
def test_only_what_is_optional_may_be_missing(monkeypatch, tmp_path, optional, status):
    assert done(monkeypatch, tmp_path, Step("tensorrt", (("-c", "pass"),), 20, ("no_such_package",), optional))[0] == status


def test_a_step_without_time_left_is_not_begun(monkeypatch, tmp_path):
    status, found = done(monkeypatch, tmp_path, Step("late", (("-c", "pass"),), 60), minutes="0.1")
    assert (status, by_name(found)["late"]["status"], found["rows"]) == (1, "not run", [])
    assert by_name(found)["late"]["said"].endswith(" s were left")


def test_weights_are_those_that_the_command_before_wrote(monkeypatch, tmp_path):
    made = (
        "import os, pathlib; run = pathlib.Path(os.environ['EBJDAT_RUNS']) / 'gpu-check' / 'a'; "
        "run.mkdir(parents=True); (run / 'weights.safetensors').touch()"
    )
    asked = ("-c", "import sys; assert sys.argv[1].endswith('gpu-check/a/weights.safetensors')", gpu_check.WEIGHTS)
    assert done(monkeypatch, tmp_path / "none", Step("training", (asked,), 20))[1]["steps"][0]["said"] == "no weights were written"
    assert done(monkeypatch, tmp_path / "some", Step("training", (("-c", made), asked), 20))[0] == 0


def test_without_a_gpu_nothing_is_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--out", str(tmp_path / "never")])
    assert gpu_check.main() == 2
    assert "there is none here" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_package_that_everything_needs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "safetensors" else name)
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "gpu-check needs safetensors" in capsys.readouterr().err


def test_the_tables_of_the_docs_are_those_of_the_results(tmp_path):
    docs = (ROOT / "docs" / "gpu.md").read_text()
    assert gpu_check.document(docs, gpu_check.read(ROOT / "benchmarks" / "gpu.json")) == docs


def test_a_report_says_what_did_not_run():
    found = {
        "machine": {"device": "a GPU", "date": "2026-01-01", "torch": "2.11"},
        "steps": [
            {"name": "tests", "status": "failed", "seconds": 41.2, "limit": 100, "said": "1 failed, 3 passed", "skipped": ["no TensorRT"]}
        ],
        "rows": [
            {**ROW, "step": "engines"},
            {
                "name": "ratio torch cuda fp32 classify batch 1 / eager torch fp32",
                "value": 1.5,
                "unit": "ratio",
                "network": "WRN-16-2",
                "step": "engines",
            },
            {"name": "onnx cuda fp32", "value": None, "unit": "unmeasured", "why": "no provider", "network": "WRN-16-2", "step": "engines"},
            {"name": "ebjdat baseline", "value": 3.0, "unit": "labelled images/s", "network": "WRN-16-4", "step": "step", "tf32": True},
        ],
    }
    report = gpu_check.report(found)
    assert "| tests | failed | 41 | 1 failed, 3 passed |" in report
    assert "| torch cuda fp32 | 2 (1.50 x) |" in report
    assert "| ebjdat baseline | WRN-16-4 | 3 | labelled images/s | TF32 |" in report
    assert report.splitlines()[-2:] == ["- tests: no TensorRT", "- WRN-16-2 onnx cuda fp32: no provider"]


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


@pytest.mark.slow
def test_all_of_it_is_rehearsed_on_the_cpu(tmp_path):
    words = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--out", str(tmp_path), "--minutes", "9"]
    began = time.monotonic()
    ran = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert time.monotonic() - began < 540
    assert [step["status"] for step in found["steps"] if step["name"] != "tensorrt"] == ["passed"] * 5
    speeds = {(row["step"], row["network"]) for row in found["rows"] if row["unit"] in ("images/s", "labelled images/s")}
    drawn = Bundle.load(SHIPPED).manifest.architecture
    bundled = f"WRN-{drawn['depth']}-{drawn['width']}"
    assert speeds == {("engines", bundled), ("engines", "WRN-10-2"), ("step", "WRN-10-1"), ("step-wide", "WRN-10-2")}
    assert "Did not run:" in gpu_check.report(found)


def test_a_pack_goes_into_a_folder_that_git_ignores(tmp_path):
    ran = subprocess.run([ROOT / "benchmarks" / "gpu_pack.sh", "docs"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "git does not ignore docs" in ran.stderr


def test_a_pack_removes_only_what_was_packed(tmp_path):
    """`gpu_pack.sh .venv` once removed the virtual environment, which git ignores, too."""
    environment = {**os.environ, "PYTHON": "false", "PACKAGES": "", "LARGE": "", "PIECE": "20"}
    folder = ROOT / "build" / f"no-pack-{os.getpid()}"
    (folder / "bin").mkdir(parents=True)
    mine = folder / "bin" / "python"
    mine.touch()
    try:
        for name in (folder, mine):
            command = [ROOT / "benchmarks" / "gpu_pack.sh", str(name.relative_to(ROOT))]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert ran.returncode == 1
            assert "holds what was not packed here" in ran.stderr
            assert mine.exists()
        (folder / "PACKED").touch()
        (folder / "piece-07").mkdir()
        subprocess.run(
            [ROOT / "benchmarks" / "gpu_pack.sh", str(folder.relative_to(ROOT))], env=environment, capture_output=True, check=False
        )
        assert mine.exists()
        assert not (folder / "piece-07").exists()
        assert (folder / "PACKED").exists()  # that run failed, and may be made again
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "value", "said"), [("PYTHON", "/no/python", "there is no /no/python"), ("PIECE", "x", "PIECE must be")])
def test_a_pack_that_cannot_be_made_leaves_the_one_before(name, value, said):
    folder = ROOT / "build" / f"pack-before-{os.getpid()}"
    folder.mkdir(parents=True)
    (folder / "PACKED").write_text("before")
    try:
        environment = {**os.environ, "PYTHON": "false", "PACKAGES": "", "LARGE": "", "PIECE": "20", name: value}
        command = [ROOT / "benchmarks" / "gpu_pack.sh", str(folder.relative_to(ROOT))]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"gpu_pack: {said}")
        assert len(ran.stderr.splitlines()) == 1
        assert (folder / "PACKED").read_text() == "before"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "{file}"], "--out: "),
        (["--out", "{file}/x"], "--out: "),
        (["--minutes", "nan"], "--minutes must be"),
        (["--minutes", "-1"], "--minutes must be"),
        (["--only", "x", "--out", "{new}"], "there is no step x"),
        (["--report", "{file}"], "must hold results"),
        (["--report", "{new}"], "No such file"),
        (["--report", "{doc}", "--from", "{file}"], "must hold results"),
        (["--report", "{doc}", "--from", "{flat}"], "must hold results"),
    ],
)
def test_what_is_wrong_with_a_call_is_one_line(monkeypatch, tmp_path, capsys, options, said):
    places = {name: tmp_path / name for name in ("file", "new", "doc", "flat")}
    places["file"].write_text("x")
    places["doc"].write_text("\n".join(gpu_check.MARKS))
    places["flat"].write_text("[]")
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--rehearse", *(option.format(**places) for option in options)])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not places["new"].exists()
    assert places["doc"].read_text() == "\n".join(gpu_check.MARKS)


@pytest.mark.slow
@pytest.mark.data
def test_what_is_packed_is_the_data_that_is_here(tmp_path):
    folder = ROOT / "build" / f"pack-{os.getpid()}"
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PACKAGES": "", "PIECE": "20"}
    environment |= {"EBJDAT_DATA": str(data_root())}
    subprocess.run([ROOT / "benchmarks" / "gpu_pack.sh", str(folder.relative_to(ROOT))], env=environment, check=True, capture_output=True)
    pieces = sorted(folder.glob("piece-*/part.*"))
    assert len(pieces) > 2 and max(piece.stat().st_size for piece in pieces) <= 20 << 20
    archive = tmp_path / "archive.tar"
    archive.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    (tmp_path / "data").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "data"], check=True)
    code = "from training.data.datasets import load; d = load('cifar10'); print(len(d.test))"
    there = {**environment, "EBJDAT_DATA": str(tmp_path / "data")}
    assert subprocess.run([sys.executable, "-c", code], env=there, check=True, capture_output=True, text=True).stdout == "10000\n"
    subprocess.run(["rm", "-r", folder], check=True)


GPU_TRAIN = ["bash", str(ROOT / "training" / "gpu_train.sh")]


def test_training_on_a_gpu_ends_where_the_check_fails(tmp_path):
    made = tmp_path / "make"
    made.write_text('#!/bin/sh\necho "no GPU: $*"\nexit 7\n', encoding="utf-8")
    made.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "EBJDAT_RUNS": str(tmp_path / "runs")}
    done = subprocess.run([*GPU_TRAIN, "digits"], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, "no GPU: gpu-check" in done.stdout) == (7, True)
    assert not (tmp_path / "runs" / "gpu-digits" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "said"), [(["digitz"], "invalid choice: 'digitz'"), (["digits", "--run", "x"], "it names its run gpu-PRESET")]
)
def test_what_cannot_be_trained_is_told_before_the_gpu_is_checked(tmp_path, words, said):
    made = tmp_path / "make"
    made.write_text("#!/bin/sh\nexit 7\n", encoding="utf-8")
    made.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "EBJDAT_RUNS": str(tmp_path / "runs")}
    done = subprocess.run([*GPU_TRAIN, *words], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_gpu_is_checked_once_a_run(tmp_path):
    made = tmp_path / "make"
    made.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/made\n', encoding="utf-8")
    made.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "EBJDAT_RUNS": str(tmp_path / "runs")}
    for _ in range(2):  # whose training is refused at once
        done = subprocess.run([*GPU_TRAIN, "digits", "--set", "nothing=1"], env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, "--set nothing=1" in done.stderr) == (1, True)
    assert len((tmp_path / "made").read_text().splitlines()) == 1


@pytest.mark.slow
def test_training_on_a_gpu_saves_and_goes_on(tmp_path):
    env = {**os.environ, "CHECKED": "1", "PYTHON": sys.executable, "EBJDAT_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [*GPU_TRAIN, "digits", "--set", "epochs=0.2", "warm_start.epochs=6", "chains.steps=1", "attack.steps=1"]
    warm = tmp_path / "gpu-digits" / "digits-fgsm"
    over = tmp_path / "bin" / "timeout"  # whose time is over when training has begun, however long that takes
    over.parent.mkdir()
    over.write_text(
        f"""#!/bin/sh
shift 3
"$@" & child=$!
until [ -s {warm}/log.jsonl ]; do kill -0 $child || exit 1; sleep 0.05; done
kill -TERM $child; wait $child; exit 124
""",
        encoding="utf-8",
    )
    over.chmod(0o755)
    shorter = {**env, "PATH": f"{over.parent}:{env['PATH']}"}
    for limit, where in (("0.02", env), ("9", shorter)):  # before the first step, and after some
        stopped = subprocess.run([*words, "--max-minutes", limit], env=where, capture_output=True, text=True, check=False)
        assert (stopped.returncode, "the same command goes on with it" in stopped.stderr) == (124, True), stopped.stderr
    assert 0 < load_position(warm / "state.pt").step < 102
    assert not (warm / "weights.safetensors").exists()
    again = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "trained" in again.stdout
    assert load_position(warm / "state.pt").step == 102  # no stage was shortened
    assert (tmp_path / "gpu-digits" / "digits" / "weights.safetensors").is_file()


def test_a_limit_that_is_no_number_is_refused_before_the_check(tmp_path):
    env = {**os.environ, "EBJDAT_RUNS": str(tmp_path / "runs")}
    for words in (["--max-minutes", "soon"], ["--max-minutes"], ["digits", "--max-minutes=-1"]):
        done = subprocess.run([*GPU_TRAIN, *words], env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, "--max-minutes takes a number" in done.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()
