"""What a search says about places: how trials that adapt a place score next to those that do not."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import nn

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.sites import sites
from inlay.files.atomic import replacing
from inlay.methods._peft import PeftModel, name_in_base
from inlay.study.sites import list_modules
from inlay.tasks.evaluation import title

LAYERS = ("attention", "mlp", "rest")
Spot = tuple[int, str]  # number of a block, and one of LAYERS


@dataclass(frozen=True)
class Cell:
    """One kind of layers in one block.

    Attributes:
        block: Its number.
        layers: attention, mlp, or rest: norms, and what is put around a whole block.
        difference: Mean score of the trials that adapt it, less that of those that do not; over 0 is better.
        error: Standard error of the difference; NaN where one side has a single trial.
        adapting: Trials that adapt it.
        others: Trials that do not.
    """

    block: int
    layers: str
    difference: float
    error: float
    adapting: int
    others: int

    @property
    def clear(self) -> bool:
        """Whether the difference is more than twice its error."""
        return abs(self.difference) > 2 * self.error


@dataclass(frozen=True)
class Placement:
    """Differences of marginal means, over trials that differ in method, rate and width as well as in place.

    Attributes:
        data: Its name.
        score: What the trials are scored by.
        trials: How many there are.
        steps: Of each of them.
        cells: Those that some trials adapt and others do not.
    """

    data: str
    score: str
    trials: int
    steps: int
    cells: list[Cell]

    def __str__(self) -> str:
        sure = [cell for cell in self.cells if not math.isnan(cell.error)]
        if not sure:
            return f"the trials ({self.trials}) are too few, or too alike, to tell places apart."
        ordered = sorted(sure, key=lambda cell: -cell.difference)
        shown = ordered if len(ordered) < 4 else [*ordered[:2], ordered[-1]]
        told = "; ".join(f"{cell.layers} of block {cell.block} {_say_difference(cell)}" for cell in shown)
        clear = sum(cell.clear for cell in sure)
        return (
            f"mean {self.score} of the trials that adapt a place, less that of the others, ± its standard error "
            f"({self.trials} trials of {self.steps} steps): {told}. {clear} of {len(sure)} places differ by more than "
            "two standard errors."
        )

    def draw(self, path: str | Path) -> Path:
        """A heat strip as PNG: a row for each kind of layers, a column for each block."""
        with replacing(Path(path)) as new:
            _draw(self).save(new)
        return Path(path)


def _say_difference(cell: Cell) -> str:
    return f"{cell.difference:+.3f} ± {cell.error:.3f} ({cell.adapting} of {cell.adapting + cell.others})"


def compare_places(scores: Mapping[int, float], places: Mapping[int, Iterable[Spot]]) -> list[Cell]:
    """The cells of a search.

    Args:
        scores: By trial, the larger the better.
        places: By trial, what it adapts.
    """
    spots = sorted({spot for each in places.values() for spot in each}, key=lambda spot: (LAYERS.index(spot[1]), spot))
    cells = []
    for spot in spots:
        sides: tuple[list[float], list[float]] = ([], [])
        for trial, score in scores.items():
            sides[spot in set(places[trial])].append(score)
        others, adapting = sides
        if others and adapting:
            difference = statistics.fmean(adapting) - statistics.fmean(others)
            cells.append(Cell(*spot, difference, _find_error(adapting, others), len(adapting), len(others)))
    return cells


def _find_error(*sides: Sequence[float]) -> float:
    """Of the difference of two means, whose variances may differ (Welch 1947)."""
    if any(len(side) < 2 for side in sides):
        return math.nan
    return math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))


def find_adapted_places(model: nn.Module) -> set[Spot]:
    """Where the trained parameters of an adapted model stand; what is in no block is left out.

    Args:
        model: With an adapter; it may be on the meta device.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_diffusion(getattr(base, "config", None)):
        return set()  # it has one place
    found = sites(base)
    beginnings = {f"{block}.": number for number, block in enumerate(found.blocks)}
    layers = {kind: tuple(f"{name}." for name in names) for kind, names in list_modules(found).items()}
    spots = set()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            name = name_in_base(name)
            block = next((number for start, number in beginnings.items() if name.startswith(start)), None)
            if block is not None:
                spots.add((block, next((kind for kind, names in layers.items() if name.startswith(names)), "rest")))
    return spots


_CELL, _ROW, _EDGE, _TOP = 104, 40, 14, 78  # pixels
_INK, _PALE, _NONE = (30, 30, 30), (130, 130, 130), (240, 240, 240)
_UNCLEAR = 0.25  # of its colour has a cell whose difference may be chance
_BEST, _WORST = (202, 80, 32), (40, 96, 170)


def _draw(found: Placement) -> Image.Image:
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    cells = {(cell.block, cell.layers): cell for cell in found.cells}
    rows = [kind for kind in LAYERS if any(cell.layers == kind for cell in found.cells)]
    blocks = sorted({cell.block for cell in found.cells})
    left = _EDGE + 74
    width = max(left + len(blocks) * _CELL + _EDGE, 620)
    image = Image.new("RGB", (width, _TOP + len(rows) * _ROW + 52), "white")
    pen = ImageDraw.Draw(image)
    pen.text(
        (_EDGE, 10), f"{title(found.score)} on {found.data}: trials that adapt a place, less the others", _INK, font
    )
    told = f"{found.trials} trials of {found.steps} steps; ± is one standard error; pale: less than two of them"
    pen.text((_EDGE, 30), told, _INK, small)
    largest = max((abs(cell.difference) for cell in found.cells), default=0.0) or 1e-9
    for column, block in enumerate(blocks):
        pen.text((left + (column + 0.5) * _CELL, _TOP - 12), f"block {block}", _INK, small, anchor="mm")
    for row, kind in enumerate(rows):
        y = _TOP + row * _ROW
        pen.text((left - 10, y + _ROW / 2), kind, _INK, small, anchor="rm")
        for column, block in enumerate(blocks):
            x, cell = left + column * _CELL, cells.get((block, kind))
            shade = 0.0 if cell is None else cell.difference / largest * (1 if cell.clear else _UNCLEAR)
            pen.rectangle((x, y, x + _CELL - 2, y + _ROW - 2), _NONE if cell is None else _mix(shade))
            if cell is not None:
                ink = "white" if abs(shade) > 0.6 else _INK if cell.clear else _PALE
                error = "one trial" if math.isnan(cell.error) else f"± {cell.error:.3f}"
                middle = x + _CELL / 2 - 1
                pen.text((middle, y + 12), f"{cell.difference:+.3f}", ink, font, anchor="mm")
                lower = f"{error}, {cell.adapting} of {cell.adapting + cell.others}"
                pen.text((middle, y + 27), lower, ink, small, anchor="mm")
    y = _TOP + len(rows) * _ROW + 14
    for i in range(-10, 11):
        pen.rectangle((left + (i + 10) * 10, y, left + (i + 11) * 10, y + 10), _mix(i / 10))
    for value, at in ((-largest, left), (0.0, left + 105), (largest, left + 210)):
        pen.text((at, y + 21), f"{value:+.3f}" if value else "0", _INK, small, anchor="mm")
    return image


def _mix(share: float) -> tuple[int, ...]:
    """From white to one colour above zero and to another one below."""
    end = _BEST if share >= 0 else _WORST
    return tuple(round(255 + (b - 255) * min(abs(share), 1.0)) for b in end)
