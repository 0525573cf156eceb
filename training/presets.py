"""Every configuration that has a name, with what it reached; the command line overrides single fields."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """One training stage. Lengths in pixel units of [0,1], energies in nats, epochs of the labelled stream."""

    name: str
    dataset: str
    method: str  # at | ebjdat
    depth: int
    width: int
    epochs: float
    seed: int = 0
    warm_start: str | None = None  # the preset whose weights this one starts from

    # optimiser: SGD with Nesterov momentum, linear warm-up then linear decay to zero
    batch_size: int = 128
    lr: float = 0.2
    lr_peak: float = 0.4  # fraction of the run at which the rate peaks
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gradient_clip: float = 0.0  # global norm, 0: none
    ema: float = 0.995
    padding: int = 4  # pixels of the random crop
    precision: str = "auto"  # auto (bf16 where the machine has it) | fp32 | bf16

    # inner maximum, l-infinity
    eps: float = 8 / 255
    attack_steps: int = 1
    attack_step_size: float = 10 / 255
    inner: str = "ce"  # ce | energy | joint_energy

    # EB-JDAT: w1 h1 + w2 h2 + w3 h3
    w1: float = 0.0
    w2: float = 0.0
    w3: float = 1.0
    w1_ramp: float = 0.1  # fraction of the run over which w1 rises from 0: h1 from step 0 is unstable
    alignment: str = "relative"  # relative | mean | paired | paper: see training/methods/ebjdat.py
    clean_weight: float = 0.0  # share of the clean image in h3; the adversarial one has 1 - clean_weight
    energy_penalty: float = 0.0  # mean E(x)^2 + mean E(x_neg)^2
    frozen_norm: bool = False  # batch norm keeps the warm start's statistics

    # chains: proximal SGLD, x <- clip(x + step_size clip(score) + noise)
    chain_batch: int = 64
    chain_steps: int = 5
    chain_step_size: float = 0.25
    chain_clip: float = 2.0
    chain_noise: float = 0.005
    data_noise: float = 0.015  # on the images whose likelihood is raised
    buffer_size: int = 10_000
    reinit: float = 0.05

    # what generation uses by default in the bundle
    sample_steps: int = 40
    prior_rank: int = 48

    # survival
    energy_gap_limit: float = 50.0  # nats; beyond it the run has diverged
    saturation_limit: float = 0.6  # share of buffer pixels at 0 or 1


CIFAR10_FGSM = Preset(
    name="cifar10-fgsm",
    dataset="cifar10",
    method="at",
    depth=16,
    width=2,
    epochs=12,
)

CIFAR10_SMALL = Preset(
    name="cifar10-small",
    dataset="cifar10",
    method="ebjdat",
    depth=16,
    width=2,
    epochs=3.3,
    warm_start="cifar10-fgsm",
    lr=0.01,
    lr_peak=0.1,
    gradient_clip=5.0,
    attack_steps=5,
    attack_step_size=2 / 255,
    w1=0.3,  # 1.0 from this warm start cost 17 points of adversarial accuracy within 40 steps
    w2=2.0,
    clean_weight=0.3,
    energy_penalty=0.002,
    frozen_norm=True,
    buffer_size=2_000,
    reinit=0.1,
    sample_steps=80,  # of 20, 40 and 80 the nearest to training images on 400 samples
)

DIGITS_FGSM = Preset(
    name="digits-fgsm",
    dataset="digits",
    method="at",
    depth=10,
    width=1,
    epochs=20,
    batch_size=64,
    eps=0.2,
    attack_step_size=0.25,
    padding=1,
    precision="fp32",
)

DIGITS = Preset(
    name="digits",
    dataset="digits",
    method="ebjdat",
    depth=10,
    width=1,
    epochs=12,
    warm_start="digits-fgsm",
    batch_size=64,
    lr=0.02,
    lr_peak=0.1,
    gradient_clip=5.0,
    eps=0.2,
    attack_steps=5,
    attack_step_size=0.05,
    padding=1,
    precision="fp32",
    w1=0.3,
    w2=2.0,
    clean_weight=0.5,
    energy_penalty=0.002,
    frozen_norm=True,
    chain_batch=32,
    buffer_size=500,
    reinit=0.1,
    sample_steps=40,
    prior_rank=24,
)

CIFAR10_FGSM_GPU = replace(CIFAR10_FGSM, name="cifar10-fgsm-gpu", width=4, epochs=25)
CIFAR10 = replace(CIFAR10_SMALL, name="cifar10", width=4, epochs=25, warm_start="cifar10-fgsm-gpu", buffer_size=10_000)

PRESETS = {preset.name: preset for preset in (CIFAR10_FGSM, CIFAR10_SMALL, CIFAR10_FGSM_GPU, CIFAR10, DIGITS_FGSM, DIGITS)}
