"""Named configurations: budgets (data, network, epochs), methods, and the refresh's presets; --set overrides fields.

``preset(method, budget)`` trains any method on any budget, so that methods can be compared on the same data, loop and number of
labelled images: a method that continues a warm start gets the remaining epochs. docs/methods.md has the results.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebjdat_serve.networks import Architecture, Plain
from ebjdat_serve.sgld import Sampler
from training.config import Preset
from training.errors import TrainingError
from training.methods import Method
from training.methods.adversary import Attack, Threat
from training.methods.at import AdversarialTraining, Mart, Standard, Trades, Weat
from training.methods.dat import Dat
from training.methods.ebjdat import EbJdat
from training.methods.jem import Jeat, Jem, pyld
from training.methods.las import LasAt
from training.methods.replay import ChainConfig
from training.methods.sharpness import Asam, Awp


@dataclass(frozen=True)
class Budget:
    """Data, network and training time, the same for every method."""

    stage: Preset  # fields common to all stages; its method is not used
    warm_epochs: float
    joint_epochs: float
    lr: float  # of a network trained from scratch
    joint_lr: float  # of a network that continues a warm start
    chains: ChainConfig  # batch, buffer and restarts; a method sets steps and lengths


CIFAR = Preset("", "cifar10", Standard(), Plain(16, 2), epochs=0)
BUDGETS = {
    "digits": Budget(
        stage=replace(
            CIFAR,
            dataset="digits",
            architecture=Plain(10, 1),
            batch_size=64,
            plain_batch=32,
            padding=1,
            precision="fp32",
            threat=Threat("linf", 0.2),
            prior_rank=24,
        ),
        warm_epochs=20,
        joint_epochs=12,
        lr=0.2,
        joint_lr=0.02,
        chains=ChainConfig(batch=32, buffer_size=480, reinit=0.1),
    ),
    "small": Budget(
        stage=replace(CIFAR, sample=replace(CIFAR.sample, steps=80)),
        warm_epochs=12,
        joint_epochs=3.3,
        lr=0.2,
        joint_lr=0.01,
        chains=ChainConfig(buffer_size=2_000, reinit=0.1),
    ),
    "large": Budget(
        stage=replace(CIFAR, architecture=Plain(16, 4), sample=replace(CIFAR.sample, steps=80)),
        warm_epochs=25,
        joint_epochs=25,
        lr=0.2,
        joint_lr=0.01,
        chains=ChainConfig(),
    ),
}
"""``small`` is for a CPU core, ``large`` for a GPU."""

JEM_CHAINS = {"steps": 20, "grad_clip": 1e6, "noise_std": 0.005, "prior": "uniform", "reinit": 0.05}
"""JEM's SGLD, step 1 and noise 0.01 in [-1,1] units, no clipping of the gradient, from uniform noise."""


def scratch(b: Budget, method: Method[Any], **changes: Any) -> Preset:
    """Return a stage that trains from random weights for the whole budget."""
    settings = {"epochs": b.warm_epochs + b.joint_epochs, "lr": b.lr, **changes}
    return replace(b.stage, method=method, **settings)


def continued(b: Budget, warm: str, method: Method[Any], **changes: Any) -> Preset:
    """Return a stage that continues the method ``warm`` with frozen batch-norm statistics, as DAT's second stage does."""
    start = replace(METHODS[warm](b), name=f"{warm}-warm", epochs=b.warm_epochs)
    settings = {"epochs": b.joint_epochs, "lr": b.joint_lr, "lr_peak": 0.1, "gradient_clip": 5.0, "frozen_norm": True, **changes}
    return replace(b.stage, method=method, warm_start=start, **settings)


def chains(b: Budget, **changes: Any) -> ChainConfig:
    """Return the budget's chains with a method's numbers."""
    return replace(b.chains, **changes)


def hosts(b: Budget, steps: int) -> dict[str, tuple[ChainConfig, dict[str, Any]]]:
    """Return chains and settings of the three joint models that EB-JDAT can be built on."""
    plus = pyld(steps, 5, 0.2, b.chains)
    return {
        "jem": (chains(b, **{**JEM_CHAINS, "steps": steps}), {"plain_augment": "crop"}),
        "jem++": (plus, {"plain_augment": "crop"}),
        "sada-jem": (chains(b, steps=steps), {"sharpness": Asam(rho=2.0)}),
    }


def ebjdat_paper(host: str) -> Callable[[Budget], Preset]:
    """Return EB-JDAT as in the paper, from random weights: w = (1, 1, 1), x_adv raising E(x, y), a signed gap."""

    def build(b: Budget) -> Preset:
        sampler, changes = hosts(b, 10)[host]
        method = EbJdat(
            w1=1.0, w2=1.0, w1_ramp=0.0, alignment="paper", clean_weight=0.5, energy_penalty=0.0, inner="joint_energy", chains=sampler
        )
        return scratch(b, method, lr=b.joint_lr, lr_peak=0.1, **changes)

    return build


def ebjdat_aligned(host: str) -> Callable[[Budget], Preset]:
    """Return our EB-JDAT: a robust warm start, frozen norms, x_adv raising the cross-entropy, a relative gap (docs/decisions/0001)."""

    def build(b: Budget) -> Preset:
        sampler, changes = hosts(b, 5)[host]
        return continued(b, "fgsm-rs", EbJdat(chains=sampler), **changes)

    return build


def dat(b: Budget) -> Preset:
    """Return DAT's second stage: constant rate, unclipped, EMA .999, two augmentation streams, as many p(x) images as labelled ones.

    Departures: the rate is five (CIFAR-10) or ten (digits) times the released .001, for budgets are short; weight decay excludes norms
    and biases, theirs is on all; the ball is l-inf as every method's here, theirs is l2 0.5 (``--set threat.norm=l2 eps=0.5``).
    """
    tiny = b.stage.dataset == "digits"  # eight pixels: shorter ascents, fewer images per window, and no cutout, which would leave nothing
    method = Dat(eta=0.05, cap=20, window=256) if tiny else Dat()
    return continued(
        b,
        "pgd-at",
        method,
        lr=b.joint_lr / 2,
        lr_peak=0.0,
        schedule="constant",
        gradient_clip=0.0,
        ema=0.999,
        augment="crop" if tiny else "strong",
        plain_augment="crop",
        plain_batch=b.stage.batch_size,
    )


def jem(b: Budget) -> Preset:
    """Return JEM with the squared-energy penalty that its authors recommend against divergence, and Adam."""
    method = Jem(energy_penalty=0.1, chains=chains(b, **JEM_CHAINS))
    return scratch(b, method, optimiser="adam", lr=b.joint_lr / 10, lr_peak=0.1, weight_decay=0.0, plain_augment="crop")


METHODS: dict[str, Callable[[Budget], Preset]] = {
    "standard": lambda b: scratch(b, Standard()),
    "fgsm-rs": lambda b: scratch(b, AdversarialTraining(Attack(steps=1, step_over_eps=1.25))),
    "pgd-at": lambda b: scratch(b, AdversarialTraining()),
    "trades": lambda b: scratch(b, Trades()),
    "mart": lambda b: scratch(b, Mart()),
    "awp-at": lambda b: scratch(b, AdversarialTraining(), sharpness=Awp(gamma=0.01)),
    "awp-trades": lambda b: scratch(b, Trades(), sharpness=Awp(gamma=0.005, after=0.1)),
    "weat": lambda b: scratch(b, Weat()),
    "las-at": lambda b: scratch(b, LasAt()),
    "jem": jem,
    "jem++": lambda b: scratch(b, Jem(chains=pyld(10, 5, 0.2, b.chains)), lr=b.lr / 4, lr_peak=0.1, plain_augment="crop"),
    "sada-jem": lambda b: scratch(b, Jem(data_noise=0.0, chains=chains(b, steps=5)), lr=b.lr / 4, lr_peak=0.1, sharpness=Asam(rho=2.0)),
    "jeat": lambda b: scratch(b, Jeat(chains=chains(b, steps=10)), lr=b.lr / 2, lr_peak=0.1),
    "dat": dat,
    "ebjdat-paper": ebjdat_paper("sada-jem"),
    "ebjdat-paper-jem": ebjdat_paper("jem"),
    "ebjdat-paper-jem++": ebjdat_paper("jem++"),
    "ebjdat-aligned": ebjdat_aligned("sada-jem"),
    "ebjdat-aligned-jem": ebjdat_aligned("jem"),
    "ebjdat-aligned-jem++": ebjdat_aligned("jem++"),
}
"""Every method by name, in the order of docs/methods.md. A new method is one file in training/methods/ and one line here."""


def preset(method: str, budget: str, dataset: str | None = None) -> Preset:
    """Return a method on a budget, named BUDGET-METHOD, or DATA-METHOD on other data; raise TrainingError for unknown names."""
    if method not in METHODS or budget not in BUDGETS:
        raise TrainingError(f"{method!r} on {budget!r}: methods are {', '.join(METHODS)}; budgets {', '.join(BUDGETS)}")
    stage = METHODS[method](BUDGETS[budget])
    where = budget if dataset in (None, stage.dataset) else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(dataset)).expanduser().resolve().name)
    return replace(stage, name=f"{where}-{method}", dataset=dataset or stage.dataset)


def refreshed(budget: str, name: str, warm: str) -> Preset:
    """Return the refresh's preset on a budget: EB-JDAT with conditional chains, without sharpness, one step in three of JEM's."""
    b = BUDGETS[budget]
    method = EbJdat(clean_weight=0.5 if budget == "digits" else 0.3, chains=chains(b, conditional=True, noise_std=0.005))
    stage = continued(b, "fgsm-rs", method)
    assert stage.warm_start is not None
    return replace(stage, name=name, warm_start=replace(stage.warm_start, name=warm))


def averaged(name: str, architecture: Architecture) -> Preset:
    """Return a recipe of four stages: FGSM-RS, PGD-7, then the mean of two EB-JDAT runs (docs/decisions/0037).

    The learning rates and lengths are those of benchmarks/equal_budget.py.
    """
    stage = replace(BUDGETS["small"].stage, architecture=architecture, ema=0.999, sample=Sampler(20, 1.0, 2.0, 0.005))
    fgsm = replace(stage, name=f"{name}-fgsm", method=AdversarialTraining(Attack(steps=1, step_over_eps=1.25)), epochs=24, batch_size=256)
    pgd7 = replace(fgsm, name=f"{name}-pgd7", method=AdversarialTraining(Attack(steps=7)), epochs=8, lr=0.1, lr_peak=0.1, warm_start=fgsm)
    joint = replace(stage, name=name, lr=0.02, lr_peak=0.1, gradient_clip=5.0, frozen_norm=True, warm_start=pgd7)
    light = EbJdat(w1=0.03, w2=0.2, clean_weight=0.0, chains=chains(BUDGETS["small"], conditional=True, noise_std=0.005))
    by_kl = replace(light, w2=6.0, alignment="kl", inner="kl", clean_weight=1.0, attack=Attack(steps=7, start="gaussian"))
    other = replace(joint, name=f"{name}-kl", method=by_kl, epochs=4.48, warm_start=None)
    return replace(joint, method=light, epochs=5.33, averaged_with=other)


DIGITS = refreshed("digits", "digits", "digits-fgsm")
CIFAR10_WRN16 = refreshed("small", "cifar10-wrn16", "cifar10-fgsm")
CIFAR10_SMALL = averaged("cifar10-small", Plain(28, 2))
CIFAR10_FULL = averaged("cifar10-full", Plain(28, 10))
CIFAR10 = averaged("cifar10", Plain(16, 4))
PRESETS = {stage.name: stage for stage in (CIFAR10_SMALL, CIFAR10_WRN16, CIFAR10, CIFAR10_FULL, DIGITS)}
"""The presets of the refresh."""
