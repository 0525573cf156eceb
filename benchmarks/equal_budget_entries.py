"""The runs of benchmarks/equal_budget.py, and the prefix and control of their rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One training run: a method or preset of training/train.py, its initial weights, and its settings."""

    method: str
    init: str  # another entry's name, "" for none; centred: its head's bias shifted so that mean E(x) = 0
    passes: float  # per labelled image and step
    settings: tuple[str, ...] = ()
    centred: bool = False
    epochs: float = 0.0  # 0: the budget over the passes


CONTINUED = ("lr=0.02", "lr_peak=0.1", "ema=0.999", "gradient_clip=5")
JOINT = (*CONTINUED, "frozen_norm=true")
PAPER = ("w1=1", "w2=1", "alignment=paper", "clean_weight=0.5", "energy_penalty=0", "inner=joint_energy", "threat.eps=0.01568627450980392")
RELEASED = ("w2=0.1", "w3=2", "alignment=released", "inner=released", "threat.eps=0.01568627450980392")
"""The released SADA-JEM variant: the method ebjdat-paper (ASAM, ten proximal steps, live norms, no clipping) with its signs and weights."""
PGD = ("attack.steps=7",)
STARTS = ("warm-fgsm", "warm")
ENTRIES: dict[str, Entry] = {
    "pgd7-scratch": Entry("pgd-at", "", 8, ("ema=0.999", *PGD), epochs=30),
    "warm-fgsm": Entry("fgsm-rs", "", 2, ("batch_size=256", "ema=0.999"), epochs=24),
    "warm": Entry("pgd-at", "warm-fgsm", 8, ("batch_size=256", "lr=0.1", "lr_peak=0.1", "ema=0.999", *PGD), epochs=8),
    # the control, its second seed, and EB-JDAT by recipe 2
    "pgd7": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD)),
    "pgd7-seed1": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD, "seed=1")),
    "ebjdat-light": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0.2", "clean_weight=0")),
    "ebjdat-light-seed1": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0.2", "clean_weight=0", "seed=1")),
    # recipe 3, TRADES with a likelihood, and TRADES alone; recipe 4, DAT's second stage
    "trades-w1": Entry(
        "cifar10-wrn16",
        "warm",
        12.5,
        (*JOINT, "w1=0.03", "alignment=kl", "inner=kl", "w2=6", "clean_weight=1", "attack.steps=7", "attack.start=gaussian"),
    ),
    "trades": Entry("trades", "warm", 9.3, (*CONTINUED, *PGD)),
    "dat": Entry("dat", "warm", 21, ("ema=0.999", "gradient_clip=5", "lr_peak=0.1", "cap=15", "eta=0.25", *PGD), centred=True),
    # the recipe of the model shipped until 2026-11-27, the likelihood alone, and recipe 5
    "ebjdat-full": Entry("cifar10-wrn16", "warm", 10.5, JOINT),
    "ebjdat-w1": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, "w1=0.03", "w2=0", "clean_weight=0")),
    # half of eps, as in the released code: plain adversarial training, the paper's signs and weights, and the released code's
    "pgd7-half": Entry("pgd-at", "warm", 8, (*CONTINUED, *PGD, "threat.eps=0.01568627450980392")),
    "ebjdat-paper-half": Entry("cifar10-wrn16", "warm", 10.5, (*JOINT, *PAPER)),
    "ebjdat-released": Entry("ebjdat-paper", "warm", 16, ("ema=0.999", *RELEASED)),
}


BUDGET = 56.0
"""Passes of a row."""
CONTROL, PREFIX = "pgd7", "wrn28-"
"""The row that differences are taken from, and the prefix of rows in benchmarks/models/."""
AVERAGES = {"ebjdat-mean": ("trades-w1", "ebjdat-light")}
"""Rows whose weights are the fp32 mean of other rows' weights."""
SHORT, SHORT_CONTROL = "short-", "pgd7-half"
"""Prefix and control of the short rows at half of eps."""
MEASURED = ("clean", "nll", "ood", "reach", "samples", "pgd", "margin", "apgd", "autoattack")
"""What --evaluate can measure of a kept row, cheapest first."""
