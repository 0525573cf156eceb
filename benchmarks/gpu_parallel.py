#!/usr/bin/env python3
"""Throughput of parallel training runs on one GPU: `python benchmarks/gpu_parallel.py --processes 1 4 8 [--json FILE]`.

Each process takes steps of a method on random images; the row is the total labelled images per second, and its ratio to
one process alone. A small network leaves a GPU idle between launches, which other processes fill.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def work(method: str, network: list[int], batch: int, begin: float, seconds: float) -> None:
    """Take steps from ``begin``, a time.time() that all processes share, and print the labelled images per second."""
    from dataclasses import replace

    import torch

    from benchmarks.train_step import Step, random_data
    from ebjdat_serve.networks.wideresnet import WideResNetArchitecture
    from training.presets import preset

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = replace(preset(method, "small"), architecture=WideResNetArchitecture(*network), batch_size=batch)
    step = Step(stage, random_data(1024), device)
    step.step()
    if time.time() > begin:
        sys.exit("late: give more --start")
    time.sleep(max(0.0, begin - time.time()))
    count = 0
    while time.time() < begin + seconds:
        step.step()
        count += 1
    print(count * batch / (time.time() - begin))


def main() -> int:
    """Print and write the figures; return 1 when a process failed, since the total is then of fewer processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--method", default="pgd-at")
    parser.add_argument("--network", type=int, nargs=2, default=[28, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--start", type=float, default=20.0, help="seconds until all processes start")
    parser.add_argument("--note", default="", help="text appended to every row's name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.method, options.network, options.batch, options.work, options.seconds)
        return 0
    if options.processes[0] != 1:
        parser.error("--processes must begin with 1, the baseline")
    rows: list[dict[str, object]] = []
    alone = 0.0
    for count in options.processes:
        begin = time.time() + options.start
        words = [sys.executable, __file__, *sys.argv[1:], "--work", str(begin)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) for _ in range(count)]
        said = [process.communicate()[0] for process in running]
        if not all(text.strip() for text in said):
            print(f"of {count} processes {sum(not text.strip() for text in said)} failed", file=sys.stderr)
            return 1
        together = sum(map(float, said))
        alone = alone or together
        name = f"{options.method} WRN-{options.network[0]}-{options.network[1]} batch {options.batch} x {count}{options.note}"
        rows.append({"name": name, "value": together, "unit": "labelled images/s"})
        rows.append({"name": f"ratio {name} / alone", "value": together / alone, "unit": "ratio"})
        print(f"{name:50}{together:10.0f} labelled images/s{together / alone:8.2f} x one alone", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
