#!/usr/bin/env python3
"""Speed of a training step: `python benchmarks/train_step.py [--json FILE]`.

Three tables: EB-JDAT against a fixed baseline written here, change by change; images per second and the share of each part
for every method; and, on a GPU, the time of an epoch over its floating-point floor. Images are random: only time is measured.
The baseline is batch 128 + 64, fp32, contiguous, parameters that require gradients throughout, separate forwards for x, x_adv, x+ and
x-, class-Gaussian draws only for re-initialised chains, no SAM, and the same threads.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebjdat_serve.bundle import write_json
from ebjdat_serve.energy import energy
from ebjdat_serve.networks.wideresnet import WideResNetArchitecture
from training.config import Preset
from training.data.datasets import Dataset
from training.data.image_folders import Split
from training.distributed import Ranks
from training.loop.loop import clipped, descend
from training.loop.run_log import scalars
from training.loop.start import new_state, precision
from training.loop.stream import Stream
from training.methods import StepContext
from training.methods.adversary import cross_entropy
from training.methods.ebjdat import EbJdat, alignment, classification
from training.methods.jem import generative, penalty
from training.methods.replay import Starts, fit_prior
from training.overrides import override, paths
from training.presets import METHODS, preset

Row = dict[str, Any]
FLOOR = 400e12  # floating-point operations per second, bf16, of the floor of an epoch
SIZES = ("batch_size", "plain_batch", "method.chains.batch")
CHANGES = ("frozen parameters", "one forward", "channels_last", "bf16")
"""Changes in the order they are added to the baseline; the full step adds folded norms while sampling, and overheads."""


def random_data(n: int = 4096, side: int = 32, classes: int = 10) -> Dataset:
    """Return random images in the shape of CIFAR-10."""
    rng = np.random.default_rng(0)
    whole = Split(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), rng.integers(0, classes, n))
    part = whole.first(64)
    return Dataset("random", tuple(map(str, range(classes))), whole, part, part, part, True, "")


@dataclass
class Baseline:
    """An unoptimised EB-JDAT step with some of ``CHANGES``."""

    stage: Preset
    data: Dataset
    device: torch.device
    changes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        p, classes = self.stage, len(self.data.names)
        assert isinstance(p.method, EbJdat)
        self.method = p.method
        torch.manual_seed(0)
        layout = torch.channels_last if "channels_last" in self.changes else torch.contiguous_format
        self.model = p.architecture.build(classes).to(self.device, memory_format=layout).eval()  # type: ignore[call-overload]
        self.model.autocast = torch.bfloat16 if "bf16" in self.changes else None
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.starts = Starts(fit_prior(self.data.train, classes, p.prior_rank), (3, *self.data.train.image.shape[1:3]), self.device)
        chains = self.method.chains
        self.chain_label = torch.arange(chains.buffer_size, device=self.device) * classes // chains.buffer_size
        self.chain = torch.rand(chains.buffer_size, *self.starts.shape, device=self.device)
        self.image = torch.rand(p.batch_size, *self.starts.shape, device=self.device)
        self.label = torch.randint(0, classes, (p.batch_size,), device=self.device)
        self.plain = torch.rand(chains.batch, *self.starts.shape, device=self.device)

    def gradient(self, objective: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return d objective / dx."""
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(objective(self.model(x)).sum(), x)
        return found

    def draw(self, label: Tensor) -> Tensor:
        """Return one class-Gaussian start per label."""
        z = torch.randn(len(label), 1, self.starts.factor.shape[1], device=self.device)
        return (self.starts.mean[label] + (z @ self.starts.factor[label]).squeeze(1)).clamp(0, 1).reshape(-1, *self.starts.shape)

    def step(self) -> None:
        """Take one step."""
        p, m, c = self.stage, self.method, self.method.chains
        self.model.requires_grad_("frozen parameters" not in self.changes)
        eps, x = p.threat.eps, self.image
        x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        for _ in range(m.attack.steps):
            g = self.gradient(lambda logits: cross_entropy(logits, self.label), x_adv)
            x_adv = (x_adv + m.attack.step_over_eps * eps * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        index = torch.randint(0, c.buffer_size, (c.batch,), device=self.device)
        fresh = (torch.rand(c.batch, device=self.device) < c.reinit).nonzero().flatten()
        label, x_neg = self.chain_label[index], self.chain[index].clone()
        x_neg[fresh] = self.draw(label[fresh])
        for _ in range(c.steps):
            g = self.gradient(lambda logits: logits.gather(1, label[:, None]), x_neg)
            x_neg = (x_neg + c.step_size * g.clamp(-c.grad_clip, c.grad_clip) + c.noise_std * torch.randn_like(x_neg)).clamp(0, 1)
        self.chain[index] = x_neg
        self.model.requires_grad_(True)
        parts = (x, x_adv, self.plain, x_neg)
        if "one forward" in self.changes:
            logits, logits_adv, plain, neg = torch.split(self.model(torch.cat(parts)), [len(part) for part in parts])
        else:
            logits, logits_adv, plain, neg = (self.model(part) for part in parts)
        h2 = alignment(energy(logits), energy(logits_adv), m.alignment)
        h3 = classification(logits, logits_adv, self.label, m.clean_weight)
        loss = m.w1 * generative(energy(plain), energy(neg)) + m.w2 * h2 + m.w3 * h3
        loss = loss + m.energy_penalty * penalty(energy(plain), energy(neg))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimiser.step()


class Step:
    """One step of the training loop, timed by part."""

    def __init__(self, stage: Preset, data: Dataset, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.state = new_state(stage, data, None, device)
        self.stream = Stream(stage, data, device, self.state.noise)
        self.count = 0
        self.parts: dict[str, float] = {}

    def step(self) -> None:
        """Take one step and add to the parts."""
        p, state = self.stage, self.state
        state.model.train(not p.frozen_norm)
        now = StepContext(p.threat, state.noise, 0.5)
        marks = [("", self.clock())]
        plain = self.stream.batch(self.count % self.stream.steps_per_epoch)
        marks.append(("data and augmentation", self.clock()))
        batch = p.method.solve(state.model, plain, state.method_state, now)
        marks.append(("inner problem", self.clock()))
        terms = descend(state.model, lambda: p.method.loss(state.model, batch, state.method_state, now), p, 0.5)
        marks.append(("loss and gradient", self.clock()))
        length = clipped(list(state.model.parameters()), p.gradient_clip)
        scalars(terms, length, Ranks())
        state.optimiser.step()
        state.update_ema(p.ema)
        marks.append(("optimiser, average, log", self.clock()))
        self.count += 1
        for (_, before), (name, after) in pairwise(marks):
            self.parts[name] = self.parts.get(name, 0.0) + after - before

    def clock(self) -> float:
        """Return the time after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def fastest(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the seconds of the fastest of ``repeats`` steps, after a warm-up step."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def ladder(stage: Preset, data: Dataset, device: torch.device, repeats: int) -> list[Row]:
    """Return the baseline, each change added to those before it, and the real step, interleaved so that all see the same machine load."""
    steps: dict[str, Callable[[], None]] = {"baseline": Baseline(stage, data, device).step}
    for i, change in enumerate(CHANGES):
        if change == "bf16" and precision(stage, device) is None:
            continue
        steps[f"+ {change}"] = Baseline(stage, data, device, frozenset(CHANGES[: i + 1])).step
    steps["training loop"] = Step(stage, data, device).step
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            best[name] = min(best[name], fastest(step, 1, device))
    rows: list[Row] = []
    for name, seconds in best.items():
        rows.append({"name": f"ebjdat {name}", "value": stage.batch_size / seconds, "unit": "labelled images/s"})
        rows.append({"name": f"ratio ebjdat {name} / baseline", "value": best["baseline"] / seconds, "unit": "ratio"})
    return rows


def by_method(names: list[str], change: Callable[[Preset], Preset], data: Dataset, device: torch.device, repeats: int) -> list[Row]:
    """Return images per second and the share of time of each part."""
    rows: list[Row] = []
    for name in names:
        step = Step(change(preset(name, "small")), data, device)
        step.step()
        step.parts.clear()
        for _ in range(repeats):
            step.step()
        total = sum(step.parts.values())
        row = {"name": f"{name} images/s", "value": step.stage.batch_size * repeats / total, "unit": "labelled images/s"}
        shares = {part: round(seconds / total, 3) for part, seconds in step.parts.items()}
        rows.append({**row, "shares": shares})
        print(f"{name:22}{row['value']:9.1f} images/s   " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()), flush=True)
    return rows


def operations(stage: Preset, images: int) -> float:
    """Return the floating-point operations of one EB-JDAT epoch: forward 1, input gradient 2, training pass 3, in forwards."""
    from torch.utils.flop_counter import FlopCounterMode

    model = stage.architecture.build(10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    m = stage.method
    assert isinstance(m, EbJdat)
    forwards = 2 * stage.batch_size * m.attack.steps + 2 * m.chains.batch * m.chains.steps
    forwards += 3 * (2 * stage.batch_size + stage.plain_batch + m.chains.batch)
    return images // stage.batch_size * forwards * float(counter.get_total_flops())


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--network", type=int, nargs=2, default=(16, 2), metavar=("DEPTH", "WIDTH"))
    parser.add_argument("--batch", type=int, help="labelled and plain images of a step, and its chains (the presets')")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = random_data()

    def sized(stage: Preset) -> Preset:
        stage = replace(stage, architecture=WideResNetArchitecture(*options.network))
        known = paths(stage) if options.batch else ()
        return override(stage, [f"{field}={options.batch}" for field in SIZES if field in known])

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    network = f"WRN-{options.network[0]}-{options.network[1]}"
    about = {"device": name, "threads": options.threads, "torch": torch.__version__, "network": network}

    def keep(rows: list[Row]) -> None:
        if options.json:
            write_json(options.json, [{**row, **about} for row in rows])

    stage = sized(preset("ebjdat-aligned-jem++", "small"))  # K = 5, 5 attack steps, no SAM
    rows: list[Row] = []
    for tf32 in (False, True) if device.type == "cuda" else (False,):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        rows += [{**row, "tf32": tf32} for row in ladder(stage, data, device, options.repeats)]
    for row in rows:
        print(f"{row['name']:48}{row['value']:10.2f} {row['unit']}{' with TF32' if row['tf32'] else ''}", flush=True)
    if device.type == "cuda":
        speed = next(row["value"] for row in rows if row["name"] == "ebjdat training loop")
        over = 45_000 / speed / (operations(stage, 45_000) / FLOOR)
        rows.append({"name": "ratio ebjdat epoch / floor at 400 TFLOP/s", "value": over, "unit": "ratio"})
        print(f"{rows[-1]['name']:48}{over:10.2f}")
    keep(rows)
    for method in options.methods:
        rows += by_method([method], sized, data, device, max(2, options.repeats // 2))
        keep(rows)


if __name__ == "__main__":
    main()
