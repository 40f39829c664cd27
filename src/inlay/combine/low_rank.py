"""Updates of low rank as two factors: B of shape (d_out, r) and A (r, d_in), whose product is ΔW.

The exact sum of two updates is their concatenation along r. A smaller r is the best approximation in the Frobenius
norm (Eckart & Young 1936), found without the matrix itself, through r x r matrices: O(d r²) instead of O(d³). The
factored form is standard linear algebra.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.combine.blocks import Blocks
from inlay.combine.norms import norm, ratio
from inlay.combine.parts import Array

EXACT = 512  # columns up to which all singular vectors are computed, as that takes no longer
SPARE = 2  # times as many directions are looked at as are wanted
GAIN = 1e-3  # of the error: what another pass has to take away


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update B A, and what its singular vectors are made of.

    Attributes:
        values: S, (r,), falling.
        up: B, (d_out, r).
        down: A, (r, d_in).
        left: (r, r), U = B left.
        right: (r, r), Vᵀ = right A.
    """

    values: Array
    up: Array
    down: Array
    left: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]

    def cut(self, width: int) -> tuple[Array, Array]:
        """B and A of the best update of rank `width`, with units of equal weight on both sides; zeros fill it up."""
        kept = min(width, len(self.values))
        root = np.sqrt(self.values[:kept].astype(np.float64))
        up = self.up @ (self.left[:, :kept] * root).astype(np.float32)
        down = (root[:, None] * self.right[:kept]).astype(np.float32) @ self.down
        if kept < width:
            up = np.pad(up, ((0, 0), (0, width - kept)))
            down = np.pad(down, ((0, width - kept), (0, 0)))
        return up, down

    def error(self, width: int) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ of the best update of rank `width`; 0 for an update of zeros."""
        return ratio(norm(self.values[width:]), norm(self.values))


def decompose_factors(up: Array, down: Array) -> Spectrum:
    """The singular values and vectors of B A, from the Gram matrices of both factors in float64.

    With A Aᵀ = V Λ Vᵀ, the eigenvalues of Λ^½ Vᵀ BᵀB V Λ^½ = W S² Wᵀ are those of B A Aᵀ Bᵀ, and U S = B V Λ^½ W. That
    takes a third of the time of QR of both factors and the SVD of their core; what it loses, squares below 1e-16 of the
    largest, is far below what float32 holds.
    """
    b, a = up.astype(np.float64), down.astype(np.float64)
    inner = b.T @ b
    roots, basis = np.linalg.eigh(a @ a.T)
    half = basis * np.sqrt(np.maximum(roots, 0))  # V Λ^½
    squares, turned = np.linalg.eigh(half.T @ inner @ half)
    squares, turned = np.maximum(squares[::-1], 0), turned[:, ::-1]
    values = np.sqrt(np.where(squares > 1e-18 * max(squares[0], 1e-300), squares, 0))
    inverse = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
    left = half @ (turned * inverse)
    return Spectrum(values.astype(np.float32), up, down, left, (left * inverse).T @ inner)


@dataclass(frozen=True)
class Fit:
    """The factors that were found for a matrix M, and how near they are to it.

    Attributes:
        up: B, (n, width).
        down: A, (width, m).
        error: ‖M - B A‖ / ‖M‖.
        norm: ‖M‖.
        slope: ‖Bᵀ (M - B A)‖: 0, but for rounding, as no A is better for this B.
    """

    up: Array
    down: Array
    error: float
    norm: float
    slope: float


def fit_factors(blocks: Blocks, width: int) -> Fit:
    """B A of rank `width` for a matrix M that comes in blocks of rows, in float64.

    B is M V, with V the directions (m, width) in which most of M lies, and A the best one for it by least squares;
    units have equal weight on both sides.
    """
    directions = _find_directions(blocks, min(width, *blocks.shape))
    ups, across = [], np.zeros(directions.shape[::-1])
    for block in blocks:
        double = block.astype(np.float64)
        ups.append(double @ directions)
        across += ups[-1].T @ double
    whole_up = np.concatenate(ups)  # its columns are orthogonal, as those of V are singular vectors, or Ritz vectors
    size = np.linalg.norm(whole_up, axis=0)
    root = np.sqrt(np.where(size > 1e-7 * size.max(initial=0), size, np.inf))  # others are rounding
    up, down = (whole_up / root).astype(np.float32), (across / root[:, None] ** 3).astype(np.float32)
    lost, whole, slope, at = 0.0, 0.0, np.zeros_like(across), 0
    for block in blocks:
        own = up[at : at + len(block)].astype(np.float64)
        left = block - own @ down
        slope += own.T @ left
        lost, whole, at = lost + norm(left) ** 2, whole + norm(block) ** 2, at + len(block)
    if (missing := width - len(down)) > 0:
        up, down = np.pad(up, ((0, 0), (0, missing))), np.pad(down, ((0, missing), (0, 0)))
    return Fit(up, down, ratio(lost**0.5, whole**0.5), whole**0.5, norm(slope))


def _find_directions(blocks: Blocks, width: int) -> npt.NDArray[np.float64]:
    """The right singular vectors of M of the `width` largest singular values, or close to them: (m, width).

    Of a matrix with few columns, or if a good part of them is wanted, as the eigenvectors of MᵀM. Else out of SPARE
    times as many random directions, which are multiplied with MᵀM and made orthogonal again until another pass over M
    takes less than GAIN of the error away: subspace iteration, Halko et al. 2011, arXiv:0909.4061, algorithm 4.4. What
    it finds is a Rayleigh-Ritz approximation.
    """
    columns, wide = blocks.shape[1], SPARE * width + 8
    if columns <= EXACT or 4 * wide > columns:
        gram = np.zeros((columns, columns))
        for block in blocks:
            double = block.astype(np.float64)
            gram += double.T @ double
        return np.linalg.eigh(gram)[1][:, ::-1][:, :width]
    basis, error = np.linalg.qr(np.random.default_rng(columns).standard_normal((columns, wide)))[0], np.inf
    while True:
        turned, whole = np.zeros_like(basis), 0.0
        for block in blocks:
            double = block.astype(np.float64)
            turned += double.T @ (double @ basis)
            whole += float(np.vdot(double, double))
        squares, vectors = np.linalg.eigh(basis.T @ turned)  # of M V
        before, error = error, math.sqrt(max(whole - squares[-width:].sum(), 0))
        if not error < (1 - GAIN) * before or error <= 1e-7 * math.sqrt(whole):  # also of NaN, which the check finds
            return basis @ vectors[:, ::-1][:, :width]
        basis = np.linalg.qr(turned)[0]


def choose_ranks(values: Mapping[str, Sequence[Array]], error: float) -> dict[str, int]:
    """Ranks by site that keep the relative error of all updates together within `error`, with the fewest units.

    The smallest singular values of all sites go first, wherever they are; each site keeps one. A site has as many
    updates side by side as it has groups, usually one, of equal ranks: their values go together.
    """
    energy = {site: np.square(np.asarray(own, np.float64)).sum(0) for site, own in values.items()}
    sizes = np.concatenate(list(energy.values()))
    owner = np.concatenate([np.full(len(v), i) for i, v in enumerate(energy.values())])
    cost = np.concatenate([np.full(v.size, float(len(values[site]))) for site, v in energy.items()])
    order = np.argsort(sizes / cost, kind="stable")
    gone = order[np.cumsum(sizes[order]) <= error**2 * sizes.sum()]
    dropped = np.bincount(owner[gone], minlength=len(values))
    return {
        site: len(values[site]) * max(1, len(v) - int(n)) for (site, v), n in zip(energy.items(), dropped, strict=True)
    }
