"""RULES: the ways to make one update of several, each with its paper, in one table.

The linear ones are exact: what they give is a sum of the updates, kept as a concatenation along the width. So is what
zip gives, which scales the columns of A before. The others work on the true updates ΔW, one module at a time (B·A with
all scales in it, never on B and A by themselves, whose averages have no meaning), and their result is cut back to a
width by its SVD.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inlay.combine.blocks import BLOCK, Blocks, find_cut, keep_largest
from inlay.combine.parts import Array
from inlay.combine.weights import Weight, divide_by_sum
from inlay.errors import BadInput

Doubles = npt.NDArray[np.float64]

RIDGE = 0.1  # of zip: what nearness to the sum counts


@dataclass(frozen=True)
class Settings:
    """What the rules need to know.

    Attributes:
        density: Share of the entries that ties, dare and magnitude keep.
        seed: Of what dare draws.
    """

    density: float = 0.5
    seed: int = 0


Merge = Callable[[list[Array], Sequence[float], Settings, str], Array]
Scale = Callable[[Doubles], Doubles]


@dataclass(frozen=True)
class Rule:
    """One row of RULES.

    Attributes:
        name: As a user calls it.
        paper: Where it comes from.
        says: What it does, in a line.
        merge: Updates of one module, weights, settings and the module's name to one update; None: their weighted sum.
        merge_trimmed: What `merge` does with updates of which the largest entries are left, entry by entry; None: it
            takes whole updates.
        normal: The weights are divided by their sum.
        needs_factors: It works on updates that come as factors B and A, as those of LoRA do.
        scale: Gram matrices of the weighted updates' columns to what each column is multiplied with; None: with 1.
    """

    name: str
    paper: str
    says: str
    merge: Merge | None = None
    merge_trimmed: Callable[[list[Array], Sequence[float]], Array] | None = None
    normal: bool = False
    needs_factors: bool = False
    scale: Scale | None = None

    @property
    def linear(self) -> bool:
        """Whether it makes the weighted sum of the updates, and no more."""
        return self.merge is None and self.scale is None


def sum_updates(deltas: list[Array], weights: Sequence[float]) -> Array:
    """The weighted sum."""
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += np.float32(weight) * delta
    return total


def ties(deltas: list[Array], weights: Sequence[float], settings: Settings, site: str) -> Array:
    """Trim small entries, elect a sign for each entry, average those that have it.

    The task vectors of the paper are the updates times their weights: these elect, and these are averaged. peft's
    `ties` elects by the updates without their weights, which gives another sign where weights differ. An entry whose
    vectors cancel has no sign and becomes 0.
    """
    return elect_signs([trim(delta, settings) for delta in deltas], weights)


def elect_signs(deltas: list[Array], weights: Sequence[float]) -> Array:
    """What `ties` does after trimming, entry by entry."""
    scaled = [np.float32(weight) * delta for delta, weight in zip(deltas, weights, strict=True)]
    elected = np.sign(np.sum(scaled, axis=0, dtype=np.float64))
    total: Array = np.zeros_like(deltas[0])
    count: Array = np.zeros(total.shape, np.float32)
    for own in scaled:
        agrees = (np.sign(own) == elected) & (elected != 0)
        total += own * agrees  # NaN stays NaN, for the check to find
        count += agrees
    total /= np.maximum(count, 1)
    return total


def count_kept(settings: Settings, size: int) -> int:
    """How many entries of an update are not trimmed: as many as peft keeps, and one at least."""
    return max(int(settings.density * size), 1)


def trim(delta: Array, settings: Settings) -> Array:
    """Keep the largest entries, and put 0 in place of the others."""
    if settings.density >= 1 or not delta.size:
        return delta
    flat = delta.reshape(-1)
    pieces = [flat[at : at + BLOCK] for at in range(0, len(flat), BLOCK)]
    cut = find_cut(pieces, count_kept(settings, len(flat)))
    return np.concatenate([*keep_largest(pieces, cut)]).reshape(delta.shape)


def magnitude(deltas: list[Array], weights: Sequence[float], settings: Settings, site: str) -> Array:
    """Keep the largest entries of each update, and add."""
    return sum_updates([trim(delta, settings) for delta in deltas], weights)


def dare(deltas: list[Array], weights: Sequence[float], settings: Settings, site: str) -> Array:
    """Drop entries at random, scale the rest up to keep the expectation, and add; a site draws the same each time."""
    if settings.density >= 1:
        return sum_updates(deltas, weights)
    import torch  # which the other rules do not need

    from inlay.methods._peft import merge_updates

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * 1_000_003 + zlib.crc32(site.encode()))
        updates = [torch.from_numpy(delta) for delta in deltas]
        merged: Array = merge_updates("dare_linear", updates, torch.tensor(weights), density=settings.density).numpy()
    return merged


def merge_in_blocks(rule: Rule, updates: Sequence[Blocks], weights: Sequence[float], settings: Settings) -> Blocks:
    """What a rule with a `merge_trimmed` makes of updates, without one of them as a whole."""
    merge = rule.merge_trimmed
    assert merge is not None
    shape = updates[0].shape
    count = count_kept(settings, shape[0] * shape[1])
    cuts = [find_cut(update, count) if settings.density < 1 else None for update in updates]

    def make() -> Iterator[Array]:
        own = zip(updates, cuts, strict=True)
        trimmed = [update if cut is None else keep_largest(update, cut) for update, cut in own]
        for deltas in zip(*trimmed, strict=True):
            yield merge(list(deltas), weights)

    return Blocks(make, shape)


def zip_columns(grams: Doubles) -> Doubles:
    """What each column of each update is multiplied with, so that the updates interfere least.

    A column j of ΔW is what input j adds to the output. Let c_i be the column of adapter i, its weight included, and
    y = Σ m_i c_i that of the result. The m_i minimise

        Σ_i (c_iᵀ (y - c_i))² + RIDGE Σ_i ‖c_i‖² ‖y - Σ_i c_i‖²

    so that in the direction that an adapter writes there is what it writes alone, and y stays near the sum. With the
    Gram matrix K of the columns that is (K + ρ I) m = diag K + ρ, ρ = RIDGE tr K. Orthogonal columns are added; of two
    equal ones the sum is not 2 but 1.09 times one.

    ZipLoRA has such coefficients for two adapters, fitted in 100 steps to what each paints of its own prompts, with a
    penalty on |m_1 · m_2|. Here there are no images: all inputs count alike, so that each column is by itself. To ask
    for both outputs whole would then give the mean of the columns; so each adapter is asked for its direction only.

    Args:
        grams: K of each column, (d_in, k, k) for k updates.

    Returns:
        The m_i, (d_in, k); 1 where all columns are zero.
    """
    diagonals = np.diagonal(grams, axis1=1, axis2=2)
    ridges = RIDGE * diagonals.sum(1)[:, None]
    ridges[ridges == 0] = 1
    matrices = grams + ridges[..., None] * np.eye(grams.shape[1])
    found: Doubles = np.linalg.solve(matrices, (diagonals + ridges)[..., None])[..., 0]
    return found


_RULES = (
    Rule("add", "Hu et al. 2021, arXiv:2106.09685, section 4", "the weighted sum of the updates: exact"),
    Rule(
        "average",
        "Chronopoulou et al. 2023, arXiv:2302.07027",
        "the sum, its weights divided by theirs: exact",
        normal=True,
    ),
    Rule(
        "task_arithmetic",
        "Ilharco et al. 2022, arXiv:2212.04089",
        "the sum; negative weights forget a task: exact",
    ),
    Rule(
        "ties",
        "Yadav et al. 2023, arXiv:2306.01708",
        "trim, elect signs, average those that agree",
        ties,
        elect_signs,
    ),
    Rule("dare", "Yu et al. 2023, arXiv:2311.03099", "drop at random, rescale, add", dare),
    Rule("magnitude", "Han et al. 2015, arXiv:1506.02626", "keep the largest entries, add", magnitude, sum_updates),
    Rule(
        "knots",
        "Stoica et al. 2024, arXiv:2410.19735",
        "ties in the singular basis that the updates share",
        ties,
        needs_factors=True,
    ),
    Rule(
        "zip",
        "after Shah et al. 2023 (ZipLoRA), arXiv:2311.13600",
        "scale the columns of each update so that they interfere least, and add",
        needs_factors=True,
        scale=zip_columns,
    ),
)
RULES = {rule.name: rule for rule in _RULES}


def find_rule(name: str, settings: Settings) -> Rule:
    """A row of RULES.

    Raises:
        InlayError: There is none of that name; a density that is no share.
    """
    if name not in RULES:
        raise BadInput(f"unknown rule {name!r}; choose one of {', '.join(RULES)}.")
    if not 0 < settings.density <= 1:
        raise BadInput(f"density must be above 0 and at most 1, not {settings.density}.")
    return RULES[name]


def weights_under_rule(rule: Rule, weights: Sequence[Weight]) -> list[Weight]:
    """The weights as the rule takes them.

    Raises:
        InlayError: An average of weights that add up to 0.
    """
    return divide_by_sum(weights) if rule.normal else list(weights)
