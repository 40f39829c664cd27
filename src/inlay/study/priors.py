"""Where the search for a learning rate starts: what was best in earlier comparisons, on the base most like this one.

    python -m inlay.study.priors runs/compare runs/photos      # take up what these comparisons found

`priors.json` holds a record for each method, base and data. A record says where to start, and no more: the best rate
depends on data, steps and pre-training too, so a search has to go on from there.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from inlay.bases.learning_rate import CONVOLUTIONAL_EXPONENT, TRANSFORMER_EXPONENT, measure_width, scale_rate
from inlay.errors import InlayError
from inlay.files.atomic import replacing
from inlay.measure import footprint
from inlay.methods import METHODS
from inlay.methods._peft import PeftModel
from inlay.study.comparison import Comparison
from inlay.study.report.save import read_comparisons
from inlay.tasks.base import load_skeleton

FILE = Path(__file__).with_name("priors.json")


@dataclass(frozen=True)
class Prior:
    """The best learning rate of one method on one base and data.

    Attributes:
        method: Name in METHODS.
        base: Its name, without the folder that it was in.
        model_type: Of its config.
        transformer: Rather than a convolutional network.
        base_width: As `measure_width` gives it.
        parameters: Of the base.
        width: Of the adapter.
        task: Name in TASKS.
        data: Its name, without the folder that it was in.
        rate: The best of those tried.
        tried: Pairs of a rate and its score on the part that chose; None where it diverged.
        source: Where this was measured, and how.
    """

    method: str
    base: str
    model_type: str
    transformer: bool
    base_width: int
    parameters: int
    width: int
    task: str
    data: str
    rate: float
    tried: list[list[float | None]]
    source: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        """A newer record with the same one takes the place of this."""
        return self.method, self.base, self.data, self.width


@cache
def load_priors() -> tuple[Prior, ...]:
    """The records that come with the package."""
    return tuple(Prior(**record) for record in json.loads(FILE.read_text(encoding="utf-8")))


def start_rate(
    method: str, base: nn.Module, width: int = 8, priors: Sequence[Prior] | None = None, task: str | None = None
) -> float:
    """The learning rate where a search should start; a starting point only, which no search should take for the best.

    Of the records of this method on bases of the same kind (transformers or convolutional networks), those of the same
    model type come first, and among these those of the same task: on one GPT-2 the best rates of texts and of their
    classification differ by ten. Of what is left, those count whose base is nearest in width, and then those of the
    nearest width of the adapter: the geometric mean of their best rates. On a wider base it falls as in `scale_rate`:
    the authors' law for transformers was found on language models with a hidden size of 2,048 and more. Our records of
    LoRA on a ViT of width 96 agree with it to a factor of two; those of all weights are up to six times higher, as
    their runs were short: a record says in `source` how long. Without a record it is the rate of METHODS, scaled for
    the base.

    Args:
        method: Name in METHODS.
        base: The model, with an adapter or without, on any device.
        width: Rank or other width of the adapter.
        priors: Records to go by; default: those of the package.
        task: Name in TASKS; None: records of all tasks are alike.
    """
    default = METHODS[method].learning_rate
    try:
        base_width, transformer = measure_width(base)
    except InlayError:
        return default
    known = load_priors() if priors is None else priors
    records = [each for each in known if each.method == method and each.transformer == transformer]
    if not records:
        return _round(scale_rate(default, base))
    model_type = _read_model_type(base)
    records = [each for each in records if each.model_type == model_type] or records
    records = [each for each in records if each.task == task] or records
    records = _keep_nearest(records, [abs(math.log(each.base_width / base_width)) for each in records])
    records = _keep_nearest(records, [abs(math.log(each.width / width)) for each in records])
    mean = math.exp(sum(math.log(each.rate) for each in records) / len(records))
    exponent = TRANSFORMER_EXPONENT if transformer else CONVOLUTIONAL_EXPONENT
    return _round(mean * min(1.0, (records[0].base_width / base_width) ** exponent))


def _read_model_type(model: nn.Module) -> str | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(getattr(base, "config", None), "model_type", None)


def _keep_nearest(records: Sequence[Prior], distances: Sequence[float]) -> list[Prior]:
    least = min(distances)
    return [record for record, distance in zip(records, distances, strict=True) if distance <= least + 1e-9]


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


def collect_priors(folders: Iterable[str | Path], known: Iterable[Prior] = ()) -> list[Prior]:
    """The known records, and those of every `comparison.json` in these folders or below, which replace older ones.

    Raises:
        InlayError: A folder without a comparison, a damaged one, or a base that is not here any more.
    """
    found = {record.key: record for record in known}
    for comparison in read_comparisons(folders):
        found |= {record.key: record for record in _read_records(comparison)}
    return sorted(found.values(), key=lambda record: record.key)


def write_priors(records: Sequence[Prior], path: Path = FILE) -> None:
    """Store records as JSON, one a line."""
    lines = ",\n".join(json.dumps(asdict(record), ensure_ascii=False) for record in records)
    with replacing(path) as new:
        new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _read_records(comparison: Comparison) -> list[Prior]:
    """One for each row that has a rate with a score."""
    base = load_skeleton(comparison.base, task=comparison.task)
    base_width, transformer = measure_width(base)
    budget = ", ".join(f"{key} {value:g}" for key, value in comparison.budget.items())
    facts: dict[str, Any] = {
        "base": _drop_folder(comparison.base),
        "model_type": base.config.model_type,
        "transformer": transformer,
        "base_width": base_width,
        "parameters": footprint(base).parameters,
        "task": comparison.task,
        "data": _drop_folder(comparison.data),
        "source": f"comparison, validation {comparison.score}, {budget}",
    }
    return [
        Prior(
            method=row.method,
            rate=row.learning_rate,
            width=row.width,
            tried=[[rate, score if math.isfinite(score) else None] for rate, score in sorted(row.curve.items())],
            **facts,
        )
        for row in comparison.rows
        if math.isfinite(row.curve.get(row.learning_rate, math.nan))
    ]


def _drop_folder(name: str) -> str:
    """A Hub id or an embedded name as it is; of a path, which means nothing elsewhere, the last part."""
    path = Path(name).expanduser()
    return path.name if path.exists() or path.is_absolute() else name


def main() -> None:
    """The command line: take up what comparisons found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="With a comparison.json, or above it.")
    parser.add_argument("--output", type=Path, default=FILE, help="Where the records are written; default: %(default)s")
    asked = parser.parse_args()
    try:
        records = collect_priors(asked.folders, load_priors())
    except InlayError as error:
        sys.exit(f"error: {error}")
    write_priors(records, asked.output)
    print(f"{len(records)} records in {asked.output}")


if __name__ == "__main__":
    main()
