#!/usr/bin/env python3
"""First contact with a GPU, or its rehearsal without one: `make gpu-check PYTHON=python3 OUT=FOLDER`, `make gpu-rehearse`.

Runs the steps below in their order, each in a process of its own with a time limit of its own: the tests marked gpu, the engines, a
training run that is cut off and resumed, and training steps of two sizes; then TensorRT, which builds engines for minutes. Needs torch,
NumPy, Pillow and safetensors; nothing is installed. FOLDER/gpu.json is written every second, so that whoever is cut off keeps what was
measured; FOLDER/STEP.log has what a step printed. `gpu_check.py --report docs/gpu.md --from gpu.json` writes the tables of the docs.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for machines where the package cannot be installed
NEEDED = ("torch", "numpy", "PIL", "safetensors")
NAMED = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "nvidia-cudnn-cu13", "onnx", "onnxscript", "numpy")
LEAST = 10.0
"""Seconds below which a step is not begun."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL of a step whose time is over."""
MARKS = ("<!-- gpu-check -->", "<!-- /gpu-check -->")
WEIGHTS = "{weights}"
"""Stands in a command for the weights that the run before it wrote."""


@dataclass(frozen=True)
class Step:
    """What is run: commands of ``python``, one after the other within ``limit`` seconds, and the packages without which they cannot.

    With ``shows`` it has passed only if the last line of its log holds that: tests that were all skipped show nothing.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    needs: tuple[str, ...] = ()
    optional: bool = False
    shows: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: passed, failed, stopped (its time was over), not run, or running; and in a line why, or what it said."""

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    said: str = ""
    skipped: tuple[str, ...] = ()


def steps(out: Path, *, rehearsal: bool) -> list[Step]:
    """Return the steps; a rehearsal takes them all on the CPU, at sizes that take seconds."""
    # another torch warns of other things
    tests = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", "-W", "default", "tests/test_gpu.py")
    small = ("--batch", "1", "2", "--seconds", "0.2", "--without-graphs") if rehearsal else ()
    deep, wide = (("10", "1"), ("10", "2")) if rehearsal else (("16", "4"), ("28", "10"))
    digits = ("training/train.py", "digits", "--only-train", "--run", "gpu-check", *(("--set", "depth=10", "width=1") if rehearsal else ()))
    judged = ("training/evaluate.py", WEIGHTS, "--data", "digits", "--part", "clean", "robustness", "--n", "8" if rehearsal else "200")
    first, second = ("0.2", "0.5") if rehearsal else ("0.3", "1")
    timed = ("benchmarks/train_step.py", *(("--batch", "8") if rehearsal else ()), "--repeats")
    return [
        Step("tests", ((*tests, "--rehearse") if rehearsal else tests,), 100, ("pytest", "hypothesis", "sklearn"), shows=" passed"),
        Step(
            "engines",
            (
                ("benchmarks/engines.py", *small, "--json", f"{out}/engines.shipped.json"),
                ("benchmarks/engines.py", *small, "--json", f"{out}/engines.wide.json", "--network", *wide),
            ),
            150,
        ),
        Step("training", ((*digits, "--max-minutes", first), (*digits, "--resume", "--max-minutes", second), judged), 150, ("sklearn",)),
        Step(
            "step", ((*timed, "3", "--json", f"{out}/step.json", "--network", *deep, "--methods", "ebjdat-aligned-jem++", "fgsm-rs"),), 60
        ),
        Step("step-wide", ((*timed, "1", "--json", f"{out}/step-wide.json", "--network", *wide, "--methods", "ebjdat-aligned-jem++"),), 90),
        Step(
            "tensorrt",
            (
                ("benchmarks/engines.py", *small, "--json", f"{out}/tensorrt.shipped.json", "--tensorrt"),
                ("benchmarks/engines.py", *small, "--json", f"{out}/tensorrt.wide.json", "--tensorrt", "--network", *wide),
            ),
            400,
            ("onnxruntime", "tensorrt"),
            optional=True,
        ),
    ]


def main() -> int:
    """Run the steps; return 2 where there is no GPU to check, 1 where a step failed, was stopped or could not run, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.3, help="time limit of all steps together (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--rehearse", action="store_true", help="the same on the CPU, at sizes that take seconds")
    parser.add_argument("--report", type=Path, metavar="FILE", help="run nothing: write the tables of FILE from --from")
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "benchmarks" / "gpu.json", help="results (benchmarks/gpu.json)")
    options = parser.parse_args()
    if not 0 <= options.minutes < math.inf:
        parser.error(f"--minutes must be a time, 0 or more, not {options.minutes}")
    if options.report:
        try:
            text = document(options.report.read_text(encoding="utf-8"), read(options.source))
            options.report.write_text(text, encoding="utf-8")
        except OSError as error:
            parser.error(str(error))
        except (ValueError, LookupError, TypeError) as error:
            parser.error(f"{options.source} must hold results of gpu-check, and {options.report} the marks {' … '.join(MARKS)}: {error!r}")
        return 0
    if why := cannot(rehearsal=options.rehearse):
        print(f"gpu-check {why}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    planned = steps(out, rehearsal=options.rehearse)
    if unknown := set(options.only or ()) - {step.name for step in planned}:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in planned)}")
    wanted = [step for step in planned if not options.only or step.name in options.only]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step that is running
    outcomes = run(wanted, out, time.monotonic() + 60 * options.minutes, machine(rehearsal=options.rehearse))
    print(summary(outcomes, list(rows(out, wanted))))
    print(f"results: {out / 'gpu.json'}")
    return 0 if all(good(outcome, step) for outcome, step in zip(outcomes, wanted, strict=True)) else 1


def good(outcome: Outcome, step: Step) -> bool:
    """Return whether an outcome is no failure: a step that cannot run is one, unless it is optional and its packages are not there."""
    return outcome.status == "passed" or (outcome.status == "not run" and step.optional)


def cannot(*, rehearsal: bool) -> str:
    """Return why nothing can be run here, or nothing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f"needs {', '.join(missing)}: install them, or name another interpreter with PYTHON="
    import torch

    if not rehearsal and not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch sees; there is none here, so nothing was measured (make gpu-rehearse runs it all on the CPU)"
    return ""


def machine(*, rehearsal: bool) -> dict[str, str]:
    """Return what the results are of: device and versions."""
    import torch

    device = "CPU, rehearsal" if rehearsal else torch.cuda.get_device_name(0)
    found = {"device": device, "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version()}
    if not rehearsal:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, encoding="utf-8", check=False) if Path("/usr/bin/nvidia-smi").exists() else None
        found["driver"] = done.stdout.strip().split("\n")[0] if done else "unknown"
    for name in NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(wanted: list[Step], out: Path, end: float, about: dict[str, str]) -> list[Outcome]:
    """Run the steps until ``end``, writing gpu.json as they go; whatever one does, the next is begun."""
    outcomes = [Outcome(step.name, "not run", limit=step.limit, said="not begun") for step in wanted]

    def keep() -> None:
        write(out / "gpu.json", {"machine": about, "steps": [asdict(outcome) for outcome in outcomes], "rows": list(rows(out, wanted))})

    for step in wanted:
        for stale in files(out, step):
            stale.unlink(missing_ok=True)
    for i, step in enumerate(wanted):
        left = min(step.limit, end - time.monotonic())
        missing = [name for name in step.needs if find_spec(name) is None]
        if missing:
            outcomes[i] = replace(outcomes[i], said=f"{', '.join(missing)} not installed here")
        elif left < LEAST:
            outcomes[i] = replace(outcomes[i], said=f"{max(0.0, left):.0f} s were left")
        else:
            print(f"{step.name}: at most {left:.0f} s", flush=True)
            outcomes[i] = replace(outcomes[i], status="running", limit=left, said="cut off")
            keep()
            outcomes[i] = taken(step, out, left, keep)
        print(line(outcomes[i]), flush=True)
        keep()
    return outcomes


def taken(step: Step, out: Path, limit: float, keep: Callable[[], None]) -> Outcome:
    """Run the commands of a step, their output in its log; return what became of it."""
    began, log = time.monotonic(), out / f"{step.name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EBJDAT_RUNS": str(out / "runs"), "PYTHONUNBUFFERED": "1"}
    status, said = "passed", ""
    with log.open("w", encoding="utf-8") as stream:
        for command in step.commands:
            words = list(command)
            if WEIGHTS in words:
                newest = max((out / "runs" / "gpu-check").rglob("weights.safetensors"), key=lambda file: file.stat().st_mtime, default=None)
                if newest is None:
                    status, said = "failed", "no weights were written"
                    break
                words[words.index(WEIGHTS)] = str(newest)
            print(f"$ python {' '.join(words)}", file=stream, flush=True)
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            code = waited(process, began + limit, keep)
            if code != 0:
                status = "stopped" if code is None else "failed"
                said = f"its {limit:.0f} s were over" if code is None else f"status {code}: {last(log)}"
                break
    text = log.read_text(encoding="utf-8", errors="replace")
    if step.shows:
        said, status = said or last(log), "failed" if status == "passed" and step.shows not in last(log) else status
    skipped = tuple(dict.fromkeys(row.split(": ", 1)[-1] for row in text.splitlines() if row.startswith("SKIPPED")))
    return Outcome(step.name, status, round(time.monotonic() - began, 1), round(limit, 1), said, skipped)


def waited(process: "subprocess.Popen[bytes]", end: float, keep: Callable[[], None]) -> int | None:
    """Wait for a process until ``end``, keeping results meanwhile; return its status, or None where its group was killed."""
    try:
        while time.monotonic() < end:
            try:
                return process.wait(min(1.0, max(0.05, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                keep()
        return None
    finally:
        for kind, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, kind)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


def last(log: Path) -> str:
    """Return the last line of a log that says something."""
    said = [row.strip() for row in log.read_text(encoding="utf-8", errors="replace").splitlines() if row.strip()]
    return said[-1].strip("= ")[:300] if said else ""


def files(out: Path, step: Step) -> list[Path]:
    """Return the files into which a step's commands write rows."""
    return [Path(words[words.index("--json") + 1]) for words in step.commands if "--json" in words]


def rows(out: Path, wanted: list[Step]) -> Iterator[Row]:
    """Yield the rows that steps have written by now, each with its step; a file that is half written is left for the next time."""
    for step in wanted:
        for file in files(out, step):
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            yield from ({**row, "step": step.name} for row in found)


def write(file: Path, content: dict[str, Any]) -> None:
    """Write JSON in one rename, so that whoever reads it, or is cut off, has a whole file."""
    from ebjdat_serve.bundle import write_json

    write_json(file, content)


def read(file: Path) -> dict[str, Any]:
    """Return the results of a file."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def line(outcome: Outcome) -> str:
    """Return an outcome in a line."""
    return f"{outcome.status:8} {outcome.name:10}{outcome.seconds:7.0f} s  {outcome.said}".rstrip()


def summary(outcomes: list[Outcome], measured: list[Row]) -> str:
    """Return what ran, what did not, and why."""
    lines = ["", "what ran and what did not:", *map(line, outcomes)]
    lines += [f"  {outcome.name}, not run: {why}" for outcome in outcomes for why in outcome.skipped]
    return "\n".join(
        [*lines, *(f"  {row['step']}, not run: {row['name']}: {row['why']}" for row in measured if row["unit"] == "unmeasured")]
    )


def document(text: str, found: dict[str, Any]) -> str:
    """Return a document with what lies between its marks made from results."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{report(found)}\n\n{MARKS[1]}{after}"


def report(found: dict[str, Any]) -> str:
    """Return the tables of results: the steps, the speeds of each network, and what did not run."""
    from benchmarks.engines import table

    about = dict(found["machine"])
    device, date = about.pop("device"), about.pop("date")
    lines = [f"{device}, {date}; {', '.join(f'{name} {value}' for name, value in about.items())}.", ""]
    lines += ["| step | | seconds | |", "|---|---|---|---|"]
    for step in found["steps"]:
        lines.append(
            f"| {step['name']} | {step['status']} | {'' if step['seconds'] is None else round(step['seconds'])} | {step['said']} |"
        )
    measured = [
        row for row in found["rows"] if row["unit"] in ("images/s", "chain steps/s", "ratio") and row.get("step") in ("engines", "tensorrt")
    ]
    for network in dict.fromkeys(row["network"] for row in measured):
        lines += ["", f"{network}:", "", table([row for row in measured if row["network"] == network])]
    others = [row for row in found["rows"] if row.get("step") not in ("engines", "tensorrt") and row["value"] is not None]
    if others:
        lines += ["", "| what | network | value | unit | |", "|---|---|---|---|---|"]
        for row in others:
            note = row.get("note", "") or ("TF32" if row.get("tf32") else "")
            lines.append(f"| {row['name']} | {row.get('network', '')} | {row['value']:.4g} | {row['unit']} | {note} |")
    missed = [f"- {step['name']}: {why}" for step in found["steps"] for why in step["skipped"]]
    missed += sorted({f"- {row['network']} {row['name']}: {row['why']}" for row in found["rows"] if row["unit"] == "unmeasured"})
    return "\n".join([*lines, *(["", "Did not run:", "", *dict.fromkeys(missed)] if missed else [])])


if __name__ == "__main__":
    sys.exit(main())
