#!/usr/bin/env python3
"""Our attacks on two public robust nets whose figures are known: `python benchmarks/public_nets.py [--json FILE]`.

alpha-beta-CROWN's resnet2b and resnet4b, adversarially trained at l-inf 2/255, must come out at 69.25 and 77.20 clean, at most 55.0 and
60.9 under APGD-CE + APGD-T on the first 1,000 test images, and where torchattacks is installed (pip install --no-deps torchattacks), full
AutoAttack must leave as many of the same 100 images as its independent implementation. The weights come from the data folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ebjdat_serve.bundle import sha256, write_json
from ebjdat_serve.cpus import cpus
from ebjdat_serve.pixels import to_unit
from training.data.datasets import data_root, load
from training.errors import DataError
from training.evaluate import work_root
from training.evaluation.autoattack import APGD, AutoAttack
from training.evaluation.crown import FILES, CrownResNet, load_crown
from training.evaluation.evaluated_model import module_spec
from training.evaluation.metrics import wilson
from training.evaluation.result_cache import ResultCache
from training.methods.adversary import Threat

KNOWN = {"resnet2b": (0.6925, 0.550), "resnet4b": (0.7720, 0.609)}
THREAT = Threat("linf", 2 / 255)


def opened(name: str) -> CrownResNet:
    """Return a net in eval mode with its weights."""
    model = load_crown(name)
    if model is None:
        raise DataError(f"{FILES[name]} is not in {data_root()}: it is Verified-Intelligence/alpha-beta-CROWN's, copy it there")
    return model


def measure(name: str, n: int, few: int, processes: int) -> list[dict[str, Any]]:
    """Return the rows of one net: clean, APGD, AutoAttack by both implementations."""
    model, test, of = opened(name), load("cifar10").test, sha256(data_root() / FILES[name])
    spec = module_spec(model, name)
    ledger = ResultCache(work_root() / "chunks", spec, spec(), processes)
    image, label = to_unit(test.image), test.label

    def row(metric: str, right: int, of_n: int, protocol: str) -> dict[str, Any]:
        found = {"name": f"{metric} {name}", "value": right / of_n, "unit": "share", "n": of_n, "interval": list(wilson(right, of_n))}
        print(f"{metric} {name}: {right / of_n:.4f} of {of_n}, {protocol}", flush=True)
        return {**found, "protocol": protocol, "seed": 0, "of": of}

    clean = int((ledger.subject.logits(image).argmax(axis=1) == label).sum())
    rows = [row("accuracy_clean", clean, len(label), "CIFAR-10 test")]
    (found,) = ledger.run(f"APGD {name}", [(AutoAttack(THREAT, APGD), image[:n], label[:n])])
    rows.append(
        row(
            "accuracy_apgd", int(found["standing"].sum()), n, f"APGD-CE and APGD-T, l-inf 2/255, first {n}; known: at most {KNOWN[name][1]}"
        )
    )
    (found,) = ledger.run(f"AutoAttack {name}", [(AutoAttack(THREAT), image[:few], label[:few])])
    rows.append(
        row("accuracy_autoattack", int(found["standing"].sum()), few, f"standard AutoAttack of pyautoattack, l-inf 2/255, first {few}")
    )
    try:
        import torchattacks
    except ImportError:
        print("the second implementation is not installed: pip install --no-deps torchattacks", file=sys.stderr)
        return rows
    attack = torchattacks.AutoAttack(model, norm="Linf", eps=THREAT.eps, version="standard", n_classes=10, seed=0)
    x, y = torch.from_numpy(image[:few]), torch.from_numpy(label[:few])
    left = int((model(attack(x, y)).argmax(dim=1) == y).sum())
    rows.append(row("accuracy_autoattack_torchattacks", left, few, f"standard AutoAttack of torchattacks, l-inf 2/255, first {few}"))
    return rows


def main() -> None:
    """Measure both nets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--autoattack", type=int, default=100)
    parser.add_argument("--processes", type=int, default=cpus())
    options = parser.parse_args()
    torch.set_num_threads(1)
    missing = [file for file in FILES.values() if not (data_root() / file).is_file()]
    if missing:
        sys.exit(f"{', '.join(missing)} not in {data_root()}: they are Verified-Intelligence/alpha-beta-CROWN's, copy them there")
    rows = [row for name in FILES for row in measure(name, options.n, options.autoattack, options.processes)]
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
