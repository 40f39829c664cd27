"""Norms of arrays of any size, and errors relative to them."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def norm(x: npt.NDArray[np.floating]) -> float:
    """The Frobenius norm, in float64, without a copy of the whole in it."""
    flat, total = x.reshape(-1), 0.0
    for i in range(0, len(flat), 16384):
        piece = flat[i : i + 16384].astype(np.float64)
        total += float(piece @ piece)
    return float(np.sqrt(total))


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 of a whole of 0."""
    return part / whole if whole > 0 else 0.0


def total_error(errors: Mapping[str, float], norms: Mapping[str, float]) -> float:
    """The relative error of all sites together, from those of each and the norms of the updates there."""
    lost = np.array([errors[site] * norms[site] for site in errors])
    return ratio(norm(lost), norm(np.array([norms[site] for site in errors])))
