#!/usr/bin/env python3
"""What counting, traces and the access log cost /classify: this tree against an earlier one, in alternating pairs.

    git worktree add /tmp/before COMMIT && python benchmarks/metrics_cost.py --against /tmp/before --json FILE

Three servers of one model are on core 0: the earlier tree's, this tree's, and this tree's with --access-log. All but one are stopped
(SIGSTOP); the load generator is on core 1. In each round every one has a turn, in an order that rotates, and the ratios of a round are to
the earlier tree's turn in it. Beside the rate it compares processor seconds per request, which other programs disturb less.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Served, closed_loop, pin, request, serving
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.pixels import encode_png

HERE = Path(__file__).parent.parent
SEED = 0
MOST = 0.02
"""Share of the throughput that /metrics and traces may cost."""
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and exit with 1 if the cost is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="checkout of the earlier tree")
    parser.add_argument("--model", type=Path, help="bundle that both serve (default: the earlier tree's shipped one)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each turn")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.against = options.against.resolve()
    options.model = (options.model or options.against / "ebjdat_serve" / "models" / "cifar10").resolve()
    pin(1)
    rows = measure(options)
    for row in rows:
        print(f"{row['name']:72}{row['value']:>12.5f} {row['unit']:12}{row['low']:>12.5f} to {row['high']:.5f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    over = [row["name"] for row in rows if row["unit"] == "share" and row["value"] > MOST]
    if over:
        sys.exit(f"above {MOST:.0%}: {'; '.join(over)}")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return medians over the rounds, each with the interval of nine in ten rounds."""
    image = np.random.default_rng(SEED).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = request("/classify", encode_png(image))
    common = ["serve", str(options.model), "--device", "cpu", "--threads", "1", "--generate-workers", "0"]
    kinds = {"before": (options.against, []), "after": (HERE, []), "after, --access-log": (HERE, ["--access-log"])}
    with contextlib.ExitStack() as running:
        servers: dict[str, Served] = {}
        asleep: dict[str, contextlib.ExitStack] = {}
        for name, (tree, extra) in kinds.items():
            command = ["env", "-C", str(tree), f"PYTHONPATH={tree}", sys.executable, "-m", "ebjdat_serve.cli", *common, *extra, "--port"]
            servers[name] = running.enter_context(serving(lambda port, command=command: [*command, str(port)]))  # type: ignore[misc]
            closed_loop(servers[name].port, data, options.connections, 1.0)
            asleep[name] = running.enter_context(contextlib.ExitStack())  # ends before its server
            asleep[name].enter_context(servers[name].asleep())
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        costs: dict[str, list[float]] = {name: [] for name in kinds}
        order = list(kinds)
        for number in range(options.rounds):
            for name in [*order[number % len(order) :], *order[: number % len(order)]]:
                asleep[name].close()
                rate, cost = turn(servers[name], data, options)
                asleep[name].enter_context(servers[name].asleep())
                rates[name].append(rate)
                costs[name].append(cost)
    protocol = f"{options.connections} connections, one 32 x 32 PNG a request, turns of {options.seconds:g} s, servers on one core"
    about = {"n": options.rounds, "seed": SEED, "protocol": protocol, "sha256": Bundle.load(options.model).key}
    about |= {"before": commit(options.against), "after": commit(HERE)}
    rows = [{**spread(f"/classify, {name}", found, "images/s"), **about} for name, found in rates.items()]
    rows += [
        {**spread(f"processor time of a request, {name}", [1e3 * one for one in found], "ms"), **about} for name, found in costs.items()
    ]
    for name in order[1:]:
        slower = [1 - after / before for after, before in zip(rates[name], rates["before"], strict=True)]
        dearer = [after / before - 1 for after, before in zip(costs[name], costs["before"], strict=True)]
        rows.append({**spread(f"throughput lost, {name}", slower, "share"), **about})
        rows.append({**spread(f"processor time added, {name}", dearer, "share"), **about})
    return rows


def turn(server: Served, data: bytes, options: argparse.Namespace) -> tuple[float, float]:
    """Return requests per second, and processor seconds of the whole tree per request. Raises RuntimeError for a refusal."""
    closed_loop(server.port, data, options.connections, 0.3)  # what was stopped catches up
    before = server.cpu()
    result = closed_loop(server.port, data, options.connections, options.seconds)
    if result.refused:
        raise RuntimeError(f"{result.refused} requests were refused: nothing is comparable")
    return result.rate, (server.cpu() - before) / len(result.seconds)


def spread(name: str, found: list[float], unit: str) -> Row:
    """Return a row: the median of ``found``, and its 5 % and 95 % quantiles."""
    low, median, high = np.quantile(found, (0.05, 0.5, 0.95))
    return {"name": name, "value": float(median), "unit": unit, "low": float(low), "high": float(high)}


def commit(tree: Path) -> str:
    """Return the commit of a checkout, and whether its files differ from it."""
    done = subprocess.run(["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or "not a checkout"


if __name__ == "__main__":
    main()
