"""Stateless normal noise, computed inside the engine from sixteen integers per chain; the same in every engine up to rounding."""

import math

import torch
from torch import Tensor

from ebjdat_serve.sgld import PRIME


def uniform(key: Tensor, step: Tensor, n: int) -> Tensor:
    """Return u (N, n) float32 in [0, 1]: row i is a polynomial in the position j whose coefficients are polynomials in the step t.

        u[j] = (sum_m c_m(t) j^m mod P) / P,   c_m(t) = sum_l key[m, l] t^l mod P,   P = 2^31 - 1

    ``key`` (N, 4, 4) int64 is uniform below P, ``step`` (N,) int64. Any four positions of any four steps are independent and uniform
    (Wegman & Carter 1981); longer runs of one chain obey linear relations modulo one, which do not affect a sampler. It needs only
    products, sums and remainders of int64, which every engine has, unlike bit shifts.
    """
    coefficient = horner(key, step[:, None])
    place = torch.arange(n, device=key.device)
    return horner(coefficient[:, None, :], place).to(torch.float32) * (1.0 / PRIME)


def horner(coefficient: Tensor, at: Tensor) -> Tensor:
    """Return sum_l coefficient[..., l] at^l mod P, by Horner's rule; no product reaches 2^63 while ``at`` is below 2^32."""
    result = coefficient[..., 3]
    for power in (2, 1, 0):
        result = (result * at + coefficient[..., power]) % PRIME
    return result


def normal(key: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise (N, *shape), an even number of values a row, by Box-Muller: row i from ``key[i]`` and ``step[i]``.

    Two positions of u make one value, so any two values are independent.
    """
    n = math.prod(shape)
    u = uniform(key, step, n)
    # u is one where its integer is near P, and never zero but for the integer zero: half a step up keeps the logarithm finite
    radius = torch.sqrt(-2.0 * torch.log((u[:, : n // 2] + 0.5 / PRIME).clip(max=1.0)))
    angle = (2.0 * math.pi) * u[:, n // 2 :]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).reshape(-1, *shape)
