"""Which units of a bottleneck with a non-linearity stay, where its sum has to be narrower.

Such units cannot be turned into one another as those of a linear update can, so that the most important ones are kept.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from inlay.combine.norms import norm, ratio, total_error
from inlay.combine.parts import Array
from inlay.errors import BadInput


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
    order, spread, hidden = _order_units(down, bias, up, act, inputs)
    kept = np.sort(order[:width])
    if hidden is None:
        out = np.column_stack([up[:, kept], np.zeros(len(up), np.float32)])
        return kept, out.astype(np.float32), ratio(norm(spread[order[width:]]), norm(spread))
    wanted = hidden @ up.T
    basis = np.column_stack([hidden[:, kept], np.ones(len(hidden))])
    fitted = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    return kept, fitted.T.astype(np.float32), ratio(norm(wanted - basis @ fitted), norm(wanted))


def unit_errors(
    down: Array, bias: Array, up: Array, act: "Activation", inputs: Array | None
) -> npt.NDArray[np.float64]:
    """The relative error that `keep_units` gives for each width from 0 to all units, (m + 1,).

    On inputs by one QR of the units in the order of their importance: each takes its share of what is added.
    """
    order, spread, hidden = _order_units(down, bias, up, act, inputs)
    if hidden is None:
        shares = spread[order] ** 2
        return np.sqrt(_list_remaining(shares, shares.sum()))
    wanted = hidden @ up.T
    basis, size = np.linalg.qr(np.column_stack([np.ones(len(hidden)), hidden[:, order]]))
    shares = ((basis.T @ wanted) ** 2).sum(1)
    shares[np.abs(np.diag(size)) < 1e-9 * np.abs(size).max()] = 0  # units that those before them make up for
    shares = np.pad(shares, (0, len(order) + 1 - len(shares)))
    return np.sqrt(_list_remaining(shares, norm(wanted) ** 2)[1:])


def _list_remaining(shares: npt.NDArray[np.floating], whole: float) -> npt.NDArray[np.float64]:
    """What is left of a whole, relative to it, after none, one, ... all of the shares."""
    gone = np.concatenate([[0.0], np.cumsum(shares, dtype=np.float64)])
    left: npt.NDArray[np.float64] = np.maximum(1 - gone / whole, 0) if whole > 0 else np.zeros(len(gone))
    return left


def _order_units(
    down: Array, bias: Array, up: Array, act: "Activation", inputs: Array | None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.floating], npt.NDArray[np.float64] | None]:
    """Units from the most important one on, how important each is (m,), and what they hold on the inputs (N, m)."""
    size = np.linalg.norm(up, axis=0)
    if inputs is None:
        spread = size * np.sqrt((down**2).sum(1) + bias**2)
        return np.argsort(-spread, kind="stable"), spread, None
    if inputs.ndim != 2 or inputs.shape[1] != down.shape[1]:
        raise BadInput(f"activations must have the shape (N, {down.shape[1]}), not {tuple(inputs.shape)}.")
    hidden = act(inputs.astype(np.float64) @ down.T + bias)
    spread = hidden.std(0) * size
    return np.argsort(-spread, kind="stable"), spread, hidden


def choose_width(errors: Mapping[str, npt.NDArray[np.float64]], norms: Mapping[str, float], error: float) -> int:
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
