#!/usr/bin/env python3
"""How long an import takes, by its phases: `python benchmarks/import_time.py SOURCE [IMPORT OPTIONS …] [--json FILE]`.

The command `ebjdat-serve import` in a process of its own, from its start to its end; each line that it prints begins a phase. What each
took of the processor is told beside (Linux's /proc), and the machine's load: other processes take their part of it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from ebjdat_serve.bundle import Bundle, sha256
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.errors import EbjdatError

PHASES = {
    "reading ": "network built and tried",
    "writing weights": "classify exported",
    "classify:": "score exported",
    "score:": "step exported",
    "step:": "weights and graphs written",
    "asking the network": "self-test asked of torch, in double precision too",
    "comparing ": "compared with the source's pipeline",
    "checking ": "checked as a server does",
}
"""What an import does from a line that begins so to the next of them."""


def measure(source: str, given: list[str]) -> list[dict[str, Any]]:
    """Return the rows of one import of ``source``; raise EbjdatError where it fails."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        line = [sys.executable, "-m", "ebjdat_serve.cli", "import", source, str(out), *given]
        began = time.monotonic()
        marks = [("started", began, 0.0)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, encoding="utf-8") as process:
            assert process.stdout is not None
            for text in process.stdout:
                print(text, end="", flush=True)
                phase = next((phase for head, phase in PHASES.items() if text.startswith(head)), None)
                marks += [(phase, time.monotonic(), processor(process.pid))] if phase else []
        ended = time.monotonic()
        if process.returncode:
            raise EbjdatError(f"the import of {source} failed")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        marks.append(("", ended, used.ru_utime + used.ru_stime))
        bundle = Bundle.load(out)
        weights = (out / "weights.safetensors").stat().st_size / 4e6
        about = {
            "source": bundle.manifest.provenance.configuration["source"],
            "side": bundle.manifest.input.height,
            "millions_of_weights": round(weights, 2),
            "classify_sha256": sha256(out / "classify.onnx"),
            "torch": version("torch"),
            "cpus": threads(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
            "load_before": round(before, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
    values = [
        ("import, wall", ended - began, "s"),
        ("import, processor time", used.ru_utime + used.ru_stime, "s"),
        ("import, peak of memory", used.ru_maxrss / 2**20, "GiB"),
    ]
    for (phase, start, spent), (_, end, then) in pairwise(marks):
        values += [(f"{phase}, wall", end - start, "s"), (f"{phase}, processor time", then - spent, "s")]
    return [{"name": name, "value": round(value, 2), "unit": unit, **about} for name, value, unit in values]


def processor(pid: int) -> float:
    """Return the processor time, in seconds, that a process has taken."""
    told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure one import and print its phases."""
    parser = parser_of(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="of ebjdat-serve import, whose options may follow")
    parser.add_argument("--json", type=Path, help="rows, in place of those of the same source")
    options, given = parser.parse_known_args()
    with command(parser):
        rows = measure(options.source, given)
        for row in rows:
            print(f"{row['name']:50} {row['value']:8.1f} {row['unit']}")
        if options.json:
            old = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
            rows = [*(row for row in old if row["source"] != rows[0]["source"]), *rows]
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
