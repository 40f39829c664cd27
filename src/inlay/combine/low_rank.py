"""Updates of low rank as two factors: B of shape (d_out, r) and A (r, d_in), whose product is ΔW.

The exact sum of two updates is their concatenation along r. A smaller r is the best approximation in the Frobenius
norm (Eckart & Young 1936), found without the matrix itself, through r x r matrices: O(d r²) instead of O(d³). The
factored form is standard linear algebra.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.combine.read import Array
from inlay.errors import InlayError


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
        return _ratio(norm(self.values[width:]), norm(self.values))


def norm(x: npt.NDArray[np.floating]) -> float:
    """The Frobenius norm, in float64, without a copy of the whole in it."""
    flat, total = x.reshape(-1), 0.0
    for i in range(0, len(flat), 16384):
        piece = flat[i : i + 16384].astype(np.float64)
        total += float(piece @ piece)
    return float(np.sqrt(total))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def spectrum(up: Array, down: Array) -> Spectrum:
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


def spectrum_of(dense: Array, width: int) -> tuple[Array, Array, float]:
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
    error = _ratio(norm(double - up @ down), norm(double))
    up, down = (down.T, up.T) if flip else (up, down)
    missing = width - up.shape[1]
    if missing > 0:
        up, down = np.pad(up, ((0, 0), (0, missing))), np.pad(down, ((0, missing), (0, 0)))
    return up.astype(np.float32), down.astype(np.float32), error


def auto_widths(values: Mapping[str, Sequence[Array]], error: float) -> dict[str, int]:
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


def total_error(errors: Mapping[str, float], norms: Mapping[str, float]) -> float:
    """The relative error of all sites together, from those of each and the norms of the updates there."""
    lost = np.array([errors[site] * norms[site] for site in errors])
    return _ratio(norm(lost), norm(np.array([norms[site] for site in errors])))


def keep_units(
    down: Array, bias: Array, up: Array, width: int, act: "Activation", inputs: Array | None
) -> tuple[npt.NDArray[np.intp], Array, float]:
    """Which units of a bottleneck stay, and what they put out.

    Without inputs a unit counts by the norm of its way in times that of its way out. With some it counts by how much
    what it adds varies there, and the way out of those that stay is fitted by least squares to what all of them add.

    Args:
        down: W_down, (m, d).
        bias: b_down, (m,).
        up: W_up, (d, m).
        width: Units to keep.
        act: The non-linearity.
        inputs: Hidden states that reach the bottleneck, (N, d); None: none are known.

    Returns:
        Numbers of the units (width,), their W_up with its bias as the last column (d, width + 1), and the relative
        error of what is added: on the inputs, or without any an estimate that takes the units for independent.
    """
    order, spread, hidden = _by_importance(down, bias, up, act, inputs)
    kept = np.sort(order[:width])
    if hidden is None:
        out = np.column_stack([up[:, kept], np.zeros(len(up), np.float32)])
        return kept, out.astype(np.float32), _ratio(norm(spread[order[width:]]), norm(spread))
    wanted = hidden @ up.T
    basis = np.column_stack([hidden[:, kept], np.ones(len(hidden))])
    fitted = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    return kept, fitted.T.astype(np.float32), _ratio(norm(wanted - basis @ fitted), norm(wanted))


def unit_errors(
    down: Array, bias: Array, up: Array, act: "Activation", inputs: Array | None
) -> npt.NDArray[np.float64]:
    """The relative error that `keep_units` gives for each width from 0 to all units, (m + 1,).

    On inputs by one QR of the units in the order of their importance: each takes its share of what is added.
    """
    order, spread, hidden = _by_importance(down, bias, up, act, inputs)
    if hidden is None:
        shares = spread[order] ** 2
        return np.sqrt(_left(shares, shares.sum()))
    wanted = hidden @ up.T
    basis, size = np.linalg.qr(np.column_stack([np.ones(len(hidden)), hidden[:, order]]))
    shares = ((basis.T @ wanted) ** 2).sum(1)
    shares[np.abs(np.diag(size)) < 1e-9 * np.abs(size).max()] = 0  # units that those before them make up for
    shares = np.pad(shares, (0, len(order) + 1 - len(shares)))
    return np.sqrt(_left(shares, norm(wanted) ** 2)[1:])


def _left(shares: npt.NDArray[np.floating], whole: float) -> npt.NDArray[np.float64]:
    """What is left of a whole, relative to it, after none, one, ... all of the shares."""
    gone = np.concatenate([[0.0], np.cumsum(shares, dtype=np.float64)])
    left: npt.NDArray[np.float64] = np.maximum(1 - gone / whole, 0) if whole > 0 else np.zeros(len(gone))
    return left


def _by_importance(
    down: Array, bias: Array, up: Array, act: "Activation", inputs: Array | None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.floating], npt.NDArray[np.float64] | None]:
    """Units from the most important one on, how important each is (m,), and what they hold on the inputs (N, m)."""
    size = np.linalg.norm(up, axis=0)
    if inputs is None:
        spread = size * np.sqrt((down**2).sum(1) + bias**2)
        return np.argsort(-spread, kind="stable"), spread, None
    if inputs.ndim != 2 or inputs.shape[1] != down.shape[1]:
        raise InlayError(f"expected activations of shape (N, {down.shape[1]}), got {tuple(inputs.shape)}.")
    hidden = act(inputs.astype(np.float64) @ down.T + bias)
    spread = hidden.std(0) * size
    return np.argsort(-spread, kind="stable"), spread, hidden


def one_width(errors: Mapping[str, npt.NDArray[np.float64]], norms: Mapping[str, float], error: float) -> int:
    """The smallest width for all sites that keeps the error of all together, from those of each by width."""
    most = max(map(len, errors.values()))
    for width in range(1, most - 1):
        here = {site: float(own[min(width, len(own) - 1)]) for site, own in errors.items()}
        if total_error(here, norms) <= error:
            return width
    return most - 1


class Activation:
    """A non-linearity of transformers by its name, on arrays; None is the identity."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __call__(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """f(x), by torch for all but the plain ones."""
        if self.name is None or self.name == "linear":
            return x
        if self.name == "relu":
            return np.maximum(x, 0)
        import torch
        from transformers.activations import ACT2FN

        with torch.no_grad():
            found: npt.NDArray[np.float64] = ACT2FN[self.name](torch.from_numpy(x)).numpy()
        return found
