#!/usr/bin/env python3
"""Check our attacks on two public robust networks with known figures: `python benchmarks/public_nets.py [--json FILE]`.

alpha-beta-CROWN's resnet2b and resnet4b, adversarially trained at l-inf 2/255, must reach 69.25 and 77.20 % clean, at most 55.0 and
60.9 % under APGD-CE + APGD-T on the first 1,000 test images, and if torchattacks is installed (pip install --no-deps torchattacks), full
AutoAttack must leave as many of the same 100 images as its independent implementation. The weights come from the data folder.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebjdat_serve.bundle import sha256, write_json
from ebjdat_serve.cpus import cpus
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images, to_json
from ebjdat_serve.sentences import protocol_words
from training.data.datasets import data_root, load
from training.errors import DataError
from training.evaluation.autoattack import APGD, AutoAttack
from training.evaluation.crown import FILES, CrownResNet, load_crown
from training.evaluation.evaluated_model import module_spec
from training.evaluation.result_cache import ResultCache, work_root
from training.evaluation.rows import proportion
from training.methods.adversary import Threat

KNOWN = {"resnet2b": (0.6925, 0.550), "resnet4b": (0.7720, 0.609)}
THREAT = Threat("linf", 2 / 255)


def opened(name: str) -> CrownResNet:
    """Return a network in eval mode with its weights."""
    model = load_crown(name)
    if model is None:
        raise DataError(f"{FILES[name]} is not in {data_root()}: copy it there from Verified-Intelligence/alpha-beta-CROWN")
    return model


def measure(name: str, n: int, few: int, processes: int) -> list[dict[str, Any]]:
    """Return the rows of one network: clean, APGD, AutoAttack by both implementations."""
    model, test, of = opened(name), load("cifar10").test, sha256(data_root() / FILES[name])
    spec = module_spec(model, name)
    ledger = ResultCache(work_root() / "chunks", spec, spec(), processes)
    image, label = to_unit(test.image), test.label

    where = Images(dataset="cifar10", split="test")

    def row(metric: str, right: int, of_n: int, images: Images = where, **more: Any) -> dict[str, Any]:
        found = proportion(metric, right, of_n, images, of)
        print(f"{metric} {name}: {found.value:.4f} of {of_n}, {protocol_words(found)}", flush=True)
        return {"name": f"{metric} {name}", "unit": "share", "model": name, **more, **to_json(found)}

    clean = int((ledger.subject.logits(image).argmax(axis=1) == label).sum())
    rows = [row("accuracy_clean", clean, len(label))]
    (found,) = ledger.run(f"APGD {name}", [(AutoAttack(THREAT, APGD), image[:n], label[:n])])
    images = replace(where, attack="apgd", norm=THREAT.norm, eps=THREAT.eps)
    rows.append(row("accuracy_apgd", int(found["robust_mask"].sum()), n, images, known_at_most=KNOWN[name][1]))
    (found,) = ledger.run(f"AutoAttack {name}", [(AutoAttack(THREAT), image[:few], label[:few])])
    images = replace(where, attack="autoattack", version="standard", norm=THREAT.norm, eps=THREAT.eps)
    rows.append(row("accuracy_autoattack", int(found["robust_mask"].sum()), few, images, implementation="pyautoattack"))
    try:
        import torchattacks
    except ImportError:
        print("the second implementation is not installed: pip install --no-deps torchattacks", file=sys.stderr)
        return rows
    attack = torchattacks.AutoAttack(model, norm="Linf", eps=THREAT.eps, version="standard", n_classes=10, seed=0)
    x, y = torch.from_numpy(image[:few]), torch.from_numpy(label[:few])
    left = int((model(attack(x, y)).argmax(dim=1) == y).sum())
    rows.append(row("accuracy_autoattack_torchattacks", left, few, images, implementation="torchattacks"))
    return rows


def main() -> None:
    """Evaluate both networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--autoattack", type=int, default=100)
    parser.add_argument("--processes", type=int, default=cpus())
    options = parser.parse_args()
    torch.set_num_threads(1)
    missing = [file for file in FILES.values() if not (data_root() / file).is_file()]
    if missing:
        sys.exit(f"{', '.join(missing)} not in {data_root()}: copy them there from Verified-Intelligence/alpha-beta-CROWN")
    rows = [row for name in FILES for row in measure(name, options.n, options.autoattack, options.processes)]
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
