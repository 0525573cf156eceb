"""Projected gradient ascent of any objective: training attacks, FGSM-RS, PGD-20 and DAT's negatives alike (arXiv 1706.06083)."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebjdat_serve.energy import energy, joint_energy
from ebjdat_serve.networks import Network
from training.distributed import Noise
from training.methods.passes import Passes, gradient_of

Classifier = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0,1] -> logits (N, K)."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), label (N,)) -> one value per image (N,), which the adversary raises."""


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return E(x, y) - E(x) = -log p(y|x), shape (N,)."""
    return F.cross_entropy(logits, label, reduction="none")


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Return KL(p(.|x) || p(.|x_adv)) = sum_y p (log p - log q), shape (N,)."""
    log_p, log_q = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


INNER: dict[str, Objective] = {
    "ce": cross_entropy,
    "energy": lambda logits, label: energy(logits),
    "joint_energy": joint_energy,
    "class_logit": lambda logits, label: -joint_energy(logits, label),
}
"""Objectives of an inner loop; ``class_logit`` is f(x)[y], the direction of a sample of class y."""


@dataclass(frozen=True)
class Ask:
    """Where an inner loop is, (N, 3, H, W), and d objective / d logits (N, K), of which it asks d objective / dx."""

    image: Tensor
    slope: Callable[[Tensor], Tensor]  # of the logits (N, K)


Search = Generator[Ask, Tensor, Tensor]
"""An inner loop: it yields what it asks, is sent the gradient (N, 3, H, W), and returns where it ends."""


@dataclass(frozen=True)
class Threat:
    """The threat model: move x by at most ``eps`` in the norm ``linf`` or ``l2``, pixels of [0,1], within [0,1]."""

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, not {self.norm!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be 0 or more, not {self.eps}")


@dataclass(frozen=True)
class Attack:
    """How the adversary searches: ``steps`` of ``step_over_eps`` times eps, from ``start`` (uniform | gaussian | image)."""

    steps: int = 10
    step_over_eps: float = 0.25
    start: str = "uniform"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.start not in ("uniform", "gaussian", "image"):
            raise ValueError(f"an attack takes 0 or more steps and starts uniform, gaussian or image, not {self.steps} from {self.start!r}")


@contextmanager
def frozen(model: nn.Module) -> Iterator[Classifier]:
    """Put ``model`` in eval mode with parameters that take no gradient, yield it as a function, and restore both on exit.

    Batch-norm statistics are read and never written, and no ``.grad`` is touched. What computes in bf16 is yielded with its norms
    folded: the same function, faster, to the precision of bf16.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            function = Passes.of(model) if isinstance(model, Network) and model.autocast is not None else model
        yield function
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def project(x_adv: Tensor, image: Tensor, threat: Threat) -> Tensor:
    """Return ``x_adv`` brought back into the ball around ``image``, then into [0,1]; shapes (N, 3, H, W).

    Clipping to [0,1] moves every pixel towards ``image``, so it never leaves the ball again. An infinite eps: the box alone.
    """
    if threat.eps == torch.inf:
        return x_adv.clamp(0.0, 1.0)
    if threat.norm == "linf":
        return x_adv.clamp(image - threat.eps, image + threat.eps).clamp(0.0, 1.0)
    delta = x_adv - image
    shrink = (threat.eps / norm(delta).clamp_min(1e-12)).clamp(max=1.0)
    return (image + shrink * delta).clamp(0.0, 1.0)


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each image, (N, 1, 1, 1)."""
    length: Tensor = x.flatten(1).norm(dim=1)
    return length[:, None, None, None]


def ascent(gradient: Tensor, kind: str) -> Tensor:
    """Return the steepest direction of unit length in the norm: the sign, or g / ||g||_2."""
    return gradient.sign() if kind == "linf" else gradient / (norm(gradient) + 1e-10)


def begin(image: Tensor, threat: Threat, start: str, noise: Noise) -> Tensor:
    """Return where the search begins: uniform in the ball, image + 0.001 N(0, 1), or the image itself."""
    if start == "image":
        return image.clone()
    if start == "gaussian":
        return project(image + 0.001 * noise.normal(*image.shape), image, threat)
    if start != "uniform":
        raise ValueError(f"start must be uniform, gaussian or image, not {start!r}")
    if threat.norm == "linf":
        return project(image + threat.eps * (2.0 * noise.uniform(*image.shape) - 1.0), image, threat)
    direction = noise.normal(*image.shape)
    radius = noise.uniform(len(image), 1, 1, 1) ** (1.0 / image[0].numel())
    return project(image + threat.eps * radius * direction / norm(direction), image, threat)


def pgd(model: nn.Module, image: Tensor, label: Tensor, *, objective: Objective, threat: Threat, attack: Attack, noise: Noise) -> Tensor:
    """Return x_adv: gradient ascents of ``objective`` in the ball, each projected.

        x <- project(x + step_size * direction(d objective / dx)),   direction = sign (l-inf) or g / ||g|| (l2)

    Image (N, 3, H, W) in [0,1]. The model is frozen meanwhile.
    """
    with frozen(model) as network:
        (x_adv,) = together(network, attacking(image, label, objective=objective, threat=threat, attack=attack, noise=noise))
    return x_adv


def attacking(
    image: Tensor, label: Tensor, *, objective: Objective, threat: Threat, attack: Attack, noise: Noise, projected: bool = True
) -> Search:
    """Return ``pgd`` as an inner loop, which may share its passes with others; not ``projected``: it may leave the ball."""
    x_adv = begin(image, threat, attack.start, noise)
    kept_in = threat if projected else Threat(threat.norm, torch.inf)
    return (yield from climbing(x_adv, label, objective, kept_in, attack.steps, attack.step_over_eps * threat.eps, image))


def climb(network: Classifier, x: Tensor, label: Tensor, objective: Objective, threat: Threat, steps: int, step_size: float) -> Tensor:
    """Return ``x`` after ``steps`` ascents of length ``step_size``, kept in the ball around it; the network must be frozen."""
    (end,) = together(network, climbing(x, label, objective, threat, steps, step_size, x))
    return end


def climbing(x: Tensor, label: Tensor, objective: Objective, threat: Threat, steps: int, step_size: float, centre: Tensor) -> Search:
    """Return ``steps`` ascents of length ``step_size`` as an inner loop, kept in the ball around ``centre``; infinite eps: in the box."""

    def slope(logits: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (found,) = torch.autograd.grad(objective(leaf, label).sum(), leaf)
        return found

    for _ in range(steps):
        gradient = yield Ask(x, slope)
        x = project(x + step_size * ascent(gradient, threat.norm), centre, threat)
    return x.detach()


def together(network: Classifier, *searches: Search) -> list[Tensor]:
    """Return where each inner loop ends: a step of all that still run is one forward and one backward.

    A GPU waits for its next call in a small network, so that the passes count and not their size. The network must be frozen.
    """
    ends: dict[int, Tensor] = {}
    asked: dict[int, Ask] = {}

    def answer(place: int, gradient: Tensor | None) -> None:
        try:
            asked[place] = searches[place].send(gradient)  # type: ignore[arg-type]
        except StopIteration as end:
            asked.pop(place, None)
            ends[place] = end.value

    for place in range(len(searches)):
        answer(place, None)
    while asked:
        places = list(asked)
        for place, gradient in zip(places, input_gradients(network, list(asked.values())), strict=True):
            answer(place, gradient)
    return [ends[place] for place in range(len(searches))]


def input_gradients(network: Classifier, asked: Sequence[Ask]) -> Sequence[Tensor]:
    """Return each one's d objective / dx, from one pass over the images of all."""
    gradient = network.gradient if isinstance(network, Passes) else partial(gradient_of, network)
    if len(asked) == 1:
        return [gradient(asked[0].image, asked[0].slope)]
    sizes = [len(ask.image) for ask in asked]

    def slope(logits: Tensor) -> Tensor:
        return torch.cat([ask.slope(part) for ask, part in zip(asked, torch.split(logits, sizes), strict=True)])

    return torch.split(gradient(torch.cat([ask.image for ask in asked]), slope), sizes)
