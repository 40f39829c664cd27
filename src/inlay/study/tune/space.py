"""What a search may try: methods, places, widths and learning rates that keep to a budget."""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.sites import sites
from inlay.errors import BadInput, InlayError
from inlay.methods import METHODS
from inlay.study.trial import Modules, Trial
from inlay.study.tune.limits import Limits

_NARROWER = 3  # powers of two below the widest that are tried as well
_EVERYWHERE = 1 / 3  # of the trials
_REFUSED = 12  # adapters of a method that exceed a limit in one draw; then no more of it are drawn
_DECADES = 0.75  # on either side of the rate at which a search starts


@dataclass(frozen=True)
class Place:
    """Where a method attaches.

    Attributes:
        name: In words.
        blocks: Numbers; None: all.
        modules: Which layers of a block.
    """

    name: str
    blocks: tuple[int, ...] | None
    modules: Modules


def list_places(model: nn.Module) -> list[Place]:
    """All blocks, halves, every second block and thirds; of each the whole, the attention and the MLP layers.

    A network in stages has these in place of thirds. A text-to-image pipeline, whose denoiser is no stack of equal
    blocks, has one place: all of them.

    Args:
        model: A transformers model, which may have an adapter, and be on the meta device.
    """
    everywhere = "all blocks"
    if is_diffusion(getattr(model, "config", None)):
        return [Place(everywhere, None, "all")]
    found = sites(model)
    count = len(found.blocks)
    groups: dict[str, tuple[int, ...] | None] = {everywhere: None}
    half = count // 2
    groups["first half"], groups["last half"] = tuple(range(half)), tuple(range(half, count))
    groups["every second block"] = tuple(range(1, count, 2))
    stages: dict[str, list[int]] = {}
    for i, name in enumerate(found.blocks):
        stages.setdefault(name.rpartition(".")[0], []).append(i)
    parts = (
        [*stages.values()] if len(stages) > 1 else [[*range(i * count // 3, (i + 1) * count // 3)] for i in range(3)]
    )
    names = (
        [f"stage {i + 1}" for i in range(len(parts))] if len(stages) > 1 else ["first third", "middle", "last third"]
    )
    groups |= {name: tuple(part) for name, part in zip(names, parts, strict=True)}
    both = bool(found.attention) and bool(found.mlp_out or found.around_mlp)
    kinds: tuple[Modules, ...] = ("all", "attention", "mlp") if both else ("all",)
    places, seen = [], set()
    for name, blocks in groups.items():
        if blocks == () or (blocks is not None and len(blocks) == count) or blocks in seen:
            continue
        seen.add(blocks)
        places += [Place(name if kind == "all" else f"{name}, {kind}", blocks, kind) for kind in kinds]
    return places


@dataclass
class Space:
    """Draws trials that keep to a budget.

    Attributes:
        methods: Names in METHODS, which take turns in an order that is drawn.
        places: Of the base; the first is everywhere.
        limits: The budget.
        start: The learning rate at which a search begins, of an adapter.
        widest: The largest width that is tried.
        seed: Of what is drawn.
        trial_seed: Of every trial.
        refused: Why a method has no place and width within the budget; filled while trials are drawn.
    """

    methods: Sequence[str]
    places: Sequence[Place]
    limits: Limits
    start: Callable[[Trial], float]
    widest: int = 64
    seed: int = 0
    trial_seed: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    _widths: dict[tuple[str, Place], list[int]] = field(default_factory=dict)

    def draw(self) -> Iterator[Trial]:
        """Trials without end, the same ones at each call.

        All methods come once before one of them comes again. A third of the trials adapts every place of its method,
        as most would without a search; the others one place, all with the same probability.

        Raises:
            BadInput: No method keeps to the budget.
        """
        generator = random.Random(self.seed)
        order = generator.sample(list(self.methods), len(self.methods))
        while order:
            for method in list(order):
                trial = self._draw_one(generator, method)
                if trial is None:
                    order.remove(method)
                else:
                    yield trial
        reasons = "; ".join(f"{method}: {reason}" for method, reason in self.refused.items())
        raise BadInput(f"nothing keeps to the budget ({reasons}); allow more, or other methods.")

    def _draw_one(self, generator: random.Random, method: str) -> Trial | None:
        """A trial of a method in the first of the drawn places where it fits, or None where it hardly ever does."""
        places = generator.sample(self.places, len(self.places))
        everywhere, share, decades = generator.random() < _EVERYWHERE, generator.random(), generator.uniform(-1, 1)
        refused = 0
        for place in [self.places[0], *places] if everywhere else places:
            widths = self.find_widths(method, place)
            for width in widths[int(share * len(widths)) :]:  # the drawn one, or a narrower one
                trial = Trial(method, 0.0, width, place.blocks, place.modules, seed=self.trial_seed)
                if self._fits(trial):
                    return replace(trial, learning_rate=float(f"{self.start(trial) * 10 ** (decades * _DECADES):.3g}"))
                refused += 1
                if refused == _REFUSED:  # each may have been measured
                    return None
        return None

    def find_widths(self, method: str, place: Place) -> list[int]:
        """The widest that keeps to the number of parameters, and powers of two below it; none where nothing does."""
        if (method, place) not in self._widths:
            self._widths[method, place] = self._list_widths(method, place)
        return self._widths[method, place]

    def _list_widths(self, method: str, place: Place) -> list[int]:
        most = self.limits.budget.params or sys.maxsize

        def count(width: int) -> float:
            try:
                return self.limits.count_params(Trial(method, 0.0, width, place.blocks, place.modules))
            except InlayError as error:
                self.refused[method] = str(error)
                return math.inf

        widest = find_widest(count, most, 1 if METHODS[method].width.startswith("none") else self.widest)
        if not widest and (least := count(1)) < math.inf:
            self.refused[method] = f"{least:,} parameters at least, {most:,} allowed"
        powers = [2**i for i in range(widest.bit_length()) if 2**i < widest]
        return [widest, *reversed(powers[-_NARROWER:])] if widest else []

    def _fits(self, adapter: Trial) -> bool:
        try:
            reason = self.limits.explain_excess(adapter)
        except InlayError as error:
            reason = str(error)
        if reason is not None:
            self.refused[adapter.method] = reason
        return reason is None


def find_widest(count: Callable[[int], float], most: float, widest: int) -> int:
    """The largest width up to `widest` whose count is `most` or less; 0 if there is none.

    Args:
        count: Never falls with the width. Where it rises by the same number for each unit, four counts are enough.
        most: That may be counted.
        widest: The largest width.
    """
    first = count(1)
    if first > most:
        return 0
    fits, too_wide = 1, widest + 1
    each = count(2) - first if widest > 1 else 0
    guess = 1 + int((most - first) / each) if each > 0 else widest
    for width in (min(guess, widest), guess + 1):  # on a straight line, the first fits and the second does not
        if fits < width < too_wide:
            fits, too_wide = (width, too_wide) if count(width) <= most else (fits, width)
    while too_wide - fits > 1:
        middle = (fits + too_wide) // 2
        fits, too_wide = (middle, too_wide) if count(middle) <= most else (fits, middle)
    return fits
