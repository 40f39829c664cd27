"""Updates of low rank as two factors: B of shape (d_out, r) and A (r, d_in), whose product is ΔW.

The exact sum of two updates is their concatenation along r. A smaller r is the best approximation in the Frobenius
norm (Eckart & Young 1936), found without the matrix itself, through r x r matrices: O(d r²) instead of O(d³). The
factored form is standard linear algebra.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.combine.norms import norm, ratio
from inlay.combine.parts import Array


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


def fit_factors(dense: Array, width: int) -> tuple[Array, Array, float]:
    """B, A and relative error of the best update of rank `width` for a dense one.

    By the eigenvectors of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW in float64: several times faster than its SVD.
    """
    flip = dense.shape[0] > dense.shape[1]
    matrix = dense.T if flip else dense
    double = matrix.astype(np.float64)
    _, vectors = np.linalg.eigh(double @ double.T)
    up = vectors[:, ::-1][:, :width]  # (n, k)
    down = up.T @ double
    size = np.linalg.norm(down, axis=1)
    root = np.sqrt(np.where(size > 0, size, 1))
    up, down = up * root, down / root[:, None]
    error = ratio(norm(double - up @ down), norm(double))
    up, down = (down.T, up.T) if flip else (up, down)
    missing = width - up.shape[1]
    if missing > 0:
        up, down = np.pad(up, ((0, 0), (0, missing))), np.pad(down, ((0, missing), (0, 0)))
    return up.astype(np.float32), down.astype(np.float32), error


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
