"""How sensitive each layer is: the model's score when this layer only is pruned."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from inlay.bases.widths import find_groups
from inlay.combine.examples import load_examples
from inlay.compress.prune.criteria import find_criterion, score_units
from inlay.compress.prune.pruning import leave_out
from inlay.compress.prune.statistics import Need, observe
from inlay.compress.prune.target import keep_best
from inlay.compress.prune.trained import TrainedModel, load_trained
from inlay.errors import BadInput
from inlay.files.atomic import replacing, write_json
from inlay.files.outputs import check_output_file
from inlay.tasks.evaluation import title

SHARES = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Sensitivity:
    """Scores of a model with one layer pruned at a time.

    Attributes:
        data: Where it was scored.
        split: On which part.
        count: On how many examples.
        metric: The first score of the task.
        criterion: By which units were left out.
        dense: The score of the whole model.
        shares: Of the units that are left out.
        layers: By group, the score at each share, and the units that it has.
        units: By group.
    """

    data: str
    split: str
    count: int
    metric: str
    criterion: str
    dense: float
    shares: tuple[float, ...]
    layers: dict[str, list[float]]
    units: dict[str, int]

    def __str__(self) -> str:
        wide = max(len(name) for name in self.layers)
        lines = [f"{title(self.metric)} on {self.data} ({self.split}, {self.count:,}); dense {self.dense:.4f}"]
        lines.append(" " * wide + "".join(f"{share:>9.0%}" for share in self.shares))
        lines += [f"{name:<{wide}}" + "".join(f"{value:>9.4f}" for value in row) for name, row in self.layers.items()]
        return "\n".join(lines)

    def write(self, path: str | Path) -> Path:
        """As .png (a heat map) or .json, by the name.

        Raises:
            InlayError: Another kind of file, or one that cannot be written.
        """
        path = check_scan_file(path)
        if path.suffix.lower() == ".json":
            write_json(path, asdict(self))
        else:
            with replacing(path) as new:
                draw_sensitivity(self).save(new)
        return path


def check_scan_file(path: str | Path) -> Path:
    """The path of a scan, if it can be written there.

    Raises:
        InlayError: It is neither .png nor .json, or cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".json"):
        raise BadInput(f"a scan is written as .png or .json, not as {str(path)!r}.")
    return check_output_file(path)


def scan_sensitivity(
    model: TrainedModel | str | Path,
    data: str | os.PathLike[str],
    *,
    criterion: str = "taylor",
    compensate: bool = False,
    kinds: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
    examples: int = 256,
    limit: int | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Score a model with each of its layers pruned by some shares, all others left whole.

    Args:
        model: As `prune` takes it, and so criterion, compensate, kinds, examples and seed.
        data: Labelled data; its training part shows what matters, the other is scored.
        criterion: Chooses the units of a layer.
        compensate: Fit what reads them.
        kinds: Of units.
        shares: Of a layer's units that are left out.
        examples: How many the criterion looks at.
        limit: Score so many at most.
        seed: Of the criterion `random`.

    Raises:
        InlayError: What `prune` says; a share that is none.
    """
    data = os.fspath(data)
    if not shares or not all(0 < share < 1 for share in shares):
        raise BadInput(f"shares must be numbers over 0 and below 1, not {list(shares)}.")
    needs: set[Need] = set(find_criterion(criterion).needs) | ({"activations"} if compensate else set())
    trained = model if isinstance(model, TrainedModel) else load_trained(model)
    groups = find_groups(trained.model, kinds)
    known = load_examples(trained, data, examples, trained.seed, training=trained.training)
    evidence = observe(trained.model, groups, known.batches, known.loss, needs)
    scores = score_units(criterion, trained.model, groups, evidence, torch.Generator().manual_seed(seed))
    dense = trained.score(data, limit=limit, resamples=1)
    metric = next(iter(dense.scores))
    layers: dict[str, list[float]] = {}
    for group in groups:
        row = layers.setdefault(group.name, [])
        for share in shares:
            count = max(1, round(group.units * (1 - share)))
            keep = {group.name: keep_best(scores[group.name], count)}
            narrower = leave_out(trained.model, groups, keep, evidence.seen if compensate else None)
            row.append(trained.with_model(narrower).score(data, limit=limit, resamples=1).scores[metric].value)
    return Sensitivity(
        data,
        dense.split,
        dense.count,
        metric,
        criterion,
        dense.scores[metric].value,
        tuple(shares),
        layers,
        {group.name: group.units for group in groups},
    )


_ROW, _CELL, _EDGE, _TOP = 20, 84, 14, 78  # pixels
_INK, _LOW, _HIGH = (30, 30, 30), (255, 255, 255), (202, 80, 32)


def draw_sensitivity(found: Sensitivity) -> Image.Image:
    """A heat map with a row for each layer: the darker, the more of the score is lost when it is pruned."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    names = {name: f"{name} ({found.units[name]})" for name in found.layers}
    left = _EDGE + max(round(small.getlength(text)) for text in names.values()) + 10
    wide = max(left + len(found.shares) * _CELL + _EDGE, 560)
    image = Image.new("RGB", (wide, _TOP + len(names) * _ROW + 46), "white")
    pen = ImageDraw.Draw(image)
    pen.text((_EDGE, 12), f"{title(found.metric)} on {Path(found.data).name} ({found.split})", _INK, font)
    told = f"one layer pruned at a time by {found.criterion}; dense {found.dense:.3f}"
    pen.text((_EDGE, 31), told, _INK, small)
    for i, share in enumerate(found.shares):
        pen.text((left + (i + 0.5) * _CELL, _TOP - 12), f"- {share:.0%}", _INK, small, anchor="mm")
    losses = [abs(found.dense - value) for row in found.layers.values() for value in row]
    largest = max(*losses, 1e-9)
    for number, (name, row) in enumerate(found.layers.items()):
        y = _TOP + number * _ROW
        pen.text((left - 10, y + _ROW / 2), names[name], _INK, small, anchor="rm")
        for i, value in enumerate(row):
            share = abs(found.dense - value) / largest
            x = left + i * _CELL
            pen.rectangle((x, y, x + _CELL - 2, y + _ROW - 2), _mix(share))
            ink = "white" if share > 0.6 else _INK
            pen.text((x + _CELL / 2 - 1, y + _ROW / 2 - 1), f"{value:.3f}", ink, small, anchor="mm")
    y = _TOP + len(names) * _ROW + 14
    for i in range(11):
        pen.rectangle((left + i * 14, y, left + (i + 1) * 14, y + 10), _mix(i / 10))
    pen.text((left, y + 20), "0", _INK, small, anchor="mm")
    pen.text((left + 154, y + 20), f"{largest:.3f} away from dense", _INK, small, anchor="mm")
    return image


def _mix(share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(_LOW, _HIGH, strict=True))
