"""What a sketch has not kept: bounds of the energy in it, and an estimate of it, from a few random probes.

M = A^T A - B^T B is what Frequent Directions lost of the Gram matrix A^T A. Three things are known of it: 0 <= M <=
delta I, its trace, and M P for a Gaussian matrix P that was drawn without knowledge of the data, because A^T (A P) can
be summed while the rows stream by. They bound <M, Z^T Z> far tighter than delta |Z|_F^2 does.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lowrank_fx.linalg import length, symmetric_eigen

_ODDS = 1e-8
"""Each of the probabilistic statements here fails with a probability of at most this over the probes."""

_LOG_ODDS = -math.log(_ODDS)


@functools.cache
def norm_factor(probes: int, odds: float = _ODDS) -> float:
    """The f with |E|_F <= f |E P|_F for any E and Gaussian P of so many columns, but for a probability ``odds`` over P.

    Chernoff's bound for a weighted sum of chi-squares: P(|E P|_F^2 <= e p |E|_F^2) <= (e exp(1 - e))^(p / 2); f is
    (e p)^-1/2 for the e where that is ``odds``.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if 0.5 * probes * (middle - 1 - math.log(middle)) < -math.log(odds):
            high = middle
        else:
            low = middle
    return 1 / math.sqrt(low * probes)


@functools.lru_cache(maxsize=4)
def gaussian(dim: int, columns: int, seed: int) -> Tensor:
    """A float64 Gaussian matrix [dim, columns] on the CPU: the same on every call, so that sketches can be merged.

    The last few are kept, because all sketches of one width ask for the same one: never write to it.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, columns, generator=generator, dtype=torch.float64, device="cpu")


def missing_energy(
    z: Tensor, delta: float, trace: tuple[float, float], probes: Tensor, image: Tensor, slip: float
) -> tuple[float, float, float, float]:
    """Bounds of <M, Z^T Z> for a matrix M with 0 <= M <= delta I.

    With zeta_1 >= zeta_2 >= ... the d eigenvalues of Z^T Z and t the trace of M, the greatest value is
    delta (zeta_1 + ... + zeta_q + f zeta_{q+1}), where q + f = t / delta: M at its largest where Z^T Z is largest. The
    least value is the same sum from the other end.

    With p probes P, m = <Z P, Z M P> / p has the mean <M, Z^T Z>. It is a quadratic form of Gaussians with the matrix
    K = sym(Z^T Z M), for which, with w = zeta_1 delta: -w / 8 <= K <= w (A B + B A >= -1/4 for 0 <= A, B <= I), and
    |K|_F^2 <= tr(M (Z^T Z)^2 M) <= w <M, Z^T Z>, and |K|_F <= |Z^T Z M|_F <= f_p |Z^T Z M P|_F. Laurent and Massart
    2000, Lemma 1, then bounds how far m is from its mean, except with probability 1e-8 for each of the two sides and
    for f_p. This holds for Z chosen without knowledge of P.

    Args:
        z: Z [m, d], float64.
        delta: the largest eigenvalue that M can have.
        trace: the least and the largest trace that M can have.
        probes: P [d, p], float64.
        image: M P [d, p], float64.
        slip: the largest error of ``image`` in Frobenius norm.

    Returns:
        The certain lower and upper bound, then the lower and upper bound from the probes.
    """
    gram = z @ z.T if z.shape[0] < z.shape[1] else z.T @ z
    zeta = symmetric_eigen(gram)[0].clamp(min=0)
    # 8 (m + d) u |Z|_F^2 is more than a product and a backward stable eigen solver can be off by.
    largest = float(zeta[0]) + 8 * sum(z.shape) * 2.0**-53 * float(gram.trace())
    weight = float(z.square().sum())
    if delta <= 0 or largest <= 0:
        return 0.0, 0.0, 0.0, 0.0
    least = delta * (weight - _leading(zeta, z.shape[1] - trace[0] / delta, weight))
    most = delta * _leading(zeta, trace[1] / delta, weight) * (1 + 1e-12)
    least = max(0.0, least - 1e-12 * delta * weight)

    count = probes.shape[1]
    turned = z @ image
    estimate = float(((z @ probes) * turned).sum()) / count
    off = largest * slip * length(probes) / count
    spread = norm_factor(count) * (length(z.T @ turned) + largest * slip)
    top, odds = largest * delta, _LOG_ODDS / count
    above, below = estimate + off, estimate - off
    step = math.sqrt(top * odds)
    upper = (step + math.sqrt(max(0.0, step**2 + above + 2 * min(top / 8, spread) * odds))) ** 2
    upper = min(upper, above + 2 * spread * math.sqrt(odds) + 2 * min(top / 8, spread) * odds)
    within = below - 2 * min(top, spread) * odds
    lower = max(0.0, within - 2 * spread * math.sqrt(odds))
    if within > 0:
        lower = max(lower, (math.sqrt(step**2 + within) - step) ** 2)
    return least, most, lower, max(0.0, upper)


def rounding_energy(z: Tensor, probes: Tensor, image: Tensor, slip: float) -> tuple[float, float]:
    """Bounds of <E, Z^T Z> for a symmetric matrix E of either sign, from E P.

    As in :func:`missing_energy`, <Z P, Z E P> / p is a quadratic form of Gaussians about <E, Z^T Z> with the matrix
    K = sym(Z^T Z E), of which only |K|_2 <= |K|_F <= f_p |Z^T Z E P|_F is known; Laurent and Massart 2000, Lemma 1, for
    both signs. Each side, and f_p, fails with probability 1e-8 over P.

    Args:
        z: Z [m, d], float64, chosen without knowledge of P.
        probes: P [d, p], float64.
        image: E P [d, p], float64.
        slip: the largest error of ``image`` in Frobenius norm.
    """
    count = probes.shape[1]
    turned, largest = z @ image, length(z) ** 2
    estimate = float(((z @ probes) * turned).sum()) / count
    spread = norm_factor(count) * (length(z.T @ turned) + largest * slip)
    odds = _LOG_ODDS / count
    off = 2 * spread * (math.sqrt(odds) + odds) + largest * slip * length(probes) / count
    return estimate - off, estimate + off


def _leading(zeta: Tensor, count: float, weight: float) -> float:
    """The sum of the ``count`` largest eigenvalues, a fraction of the last one included."""
    if count >= zeta.shape[0]:
        return weight
    whole = max(0, math.floor(count))
    return float(zeta[:whole].sum()) + max(0.0, count - whole) * float(zeta[whole])


def nystrom_rows(probes: Tensor, image: Tensor, trace: float, noise: float) -> Tensor:
    """Rows N with N^T N close to M and not above it: M P (P^T M P)^+ P^T M.

    Source: Nystrom's approximation of a positive semidefinite matrix (Gittens and Mahoney 2016, equation 1).

    Args:
        probes: P [d, s].
        image: M P [d, s], float64.
        trace: the trace of M, which N^T N is scaled down to where rounding would exceed it.
        noise: the eigenvalues of P^T M P that rounding may have made; they count as zero.

    Returns:
        N [r, d], float64.
    """
    core = probes.to(torch.float64).T @ image
    values, vectors = symmetric_eigen((core + core.T) / 2)
    kept = int((values > max(noise, 1e-6 * float(values.amax()))).sum()) if values.numel() else 0
    rows = (image @ (vectors[:, :kept] / values[:kept].sqrt())).T
    found = float(rows.square().sum())
    return rows * math.sqrt(trace / found) if found > trace else rows
