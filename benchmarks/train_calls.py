#!/usr/bin/env python3
"""Calls of a training step, which a GPU waits for in a small network: `python benchmarks/train_calls.py [--json FILE] [--as NAME]`.

Counted on the CPU by the profiler, of EB-JDAT and its warm start on WRN-16-4, with a batch of eight images of 8 x 8, on neither of which
they depend: calls of ATen that no other call of ATen made, by part of the step, and reads of the host, for which it waits until the device
is done.
``captured``: as on a GPU, where the passes of inner loops are recorded and a launch counts as one; the launches are played on the CPU.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.train_step import Step, random_data
from training.config import Preset
from training.methods import passes
from training.presets import refreshed

JOINT = refreshed("large", "wrn16-4", "wrn16-4-fgsm")
"""EB-JDAT as ``cifar10-wrn16`` has it, on WRN-16-4."""
Row = dict[str, Any]
PARTS = ("data and augmentation", "inner problem", "loss and gradient", "optimiser, average, log")
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")
BATCH, SIDE = 8, 8
WARM = 3
"""Steps after which every step's passes are captured."""
MARK, LAUNCH = "mark of a part", "launch of what was captured"
CALLS = ("aten::", LAUNCH)


class Marked(Step):
    """A step whose parts are told apart by marks in the profile."""

    def clock(self) -> float:
        """Leave a mark."""
        with record_function(MARK):
            return 0.0


class Reads(TorchFunctionMode):
    """Counts what waits for the device, by the name of the method."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rpartition(".")[2]
        if name in READS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def tiny(stage: Preset) -> Preset:
    """Return a preset with a batch of eight; its network, and so its calls, are unchanged."""
    changes: dict[str, Any] = {}
    if hasattr(stage.method, "chains"):
        changes["method"] = replace(stage.method, chains=replace(stage.method.chains, batch=BATCH, buffer_size=10 * BATCH))  # type: ignore[type-var]
    return replace(stage, batch_size=BATCH, plain_batch=BATCH, precision="bf16", warm_start=None, **changes)


@contextmanager
def captured() -> Iterator[None]:
    """Have inner loops take the road of a GPU: what is captured there is called here, and counts as the one launch that it is there."""

    def launch(function: Callable[[], None], pool: object) -> Callable[[], None]:
        def replay() -> None:
            with record_function(LAUNCH):
                function()

        return replay

    with (
        patch.object(passes, "captured", launch),
        patch.object(passes, "on_gpu", lambda image: True),
        patch.object(passes, "FEW", 1),
        patch.object(torch.cuda, "graph_pool_handle", object),
    ):
        yield


def counted(stage: Preset, warm: int = 1) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Return the calls of a preset's step by part and name, and its reads of the host by name, after ``warm`` steps."""
    step = Marked(tiny(stage), random_data(20 * BATCH, SIDE), torch.device("cpu"))
    for _ in range(warm):
        step.step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:  # of one cycle; torch 2.11 warns without
        step.step()
    with Reads() as reads:
        step.step()
    calls = {part: Counter[str]() for part in PARTS}
    part = -1
    for event in sorted(seen.events(), key=lambda event: event.time_range.start):
        if event.name == MARK:
            part += 1
        elif event.name.startswith(CALLS) and not made_by_another(event):
            calls[PARTS[part]][event.name.removeprefix("aten::")] += 1
    return calls, reads.seen


def made_by_another(event: Any) -> bool:
    """Return whether a call of ATen, or a launch of what was captured, made this one."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(CALLS):
        parent = parent.cpu_parent
    return parent is not None


def main() -> None:
    """Print the counts, and write them beside those of other names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as", dest="title", default="now", help="name of these counts in the JSON (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.is_file() else []
    rows = [row for row in rows if row["at"] != options.title]
    assert JOINT.warm_start is not None
    for road, warm in ((nullcontext, 1), (captured, WARM)):
        for stage in (JOINT, JOINT.warm_start):
            with road():
                calls, reads = counted(stage, warm)
            parts = {part: sum(found.values()) for part, found in calls.items()}
            about = {"at": options.title, "preset": stage.name, "captured": road is captured, "torch": torch.__version__}
            rows.append({**about, "calls": sum(parts.values()), "parts": parts, "reads": dict(reads)})
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
