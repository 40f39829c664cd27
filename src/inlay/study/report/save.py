"""Everything that shows a comparison, as files of one folder."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from inlay.errors import BadInput
from inlay.files.atomic import replacing
from inlay.study.comparison import Comparison
from inlay.study.report.kinds import write_markdown_kinds
from inlay.study.report.page import write_page
from inlay.study.report.plots import draw_all
from inlay.study.report.table import write_csv_table, write_markdown_table, write_overview_table

PAGE, TABLE, STORED = "comparison.html", "comparison.md", "comparison.json"


def read_comparisons(folders: Iterable[str | Path]) -> list[Comparison]:
    """Every `comparison.json` in these folders or below, in their order.

    Raises:
        InlayError: A folder that has none, or a damaged one.
    """
    found = []
    for folder in folders:
        path = Path(folder).expanduser()
        paths = [path] if path.is_file() else sorted(path.rglob(STORED))
        if not paths:
            raise BadInput(f"there is no {STORED} in {folder}; give folders that a comparison has written.")
        found += [Comparison.read(each) for each in paths]
    return found


def save_comparison(
    comparison: Comparison | Sequence[Comparison], folder: str | Path, *, anchors: bool = False
) -> Path:
    """Write a comparison as .json, .md, .csv, plots, pros and cons, and one page; of several each into its own folder.

    Files that are there already are replaced, each completely or not at all; others in the folder stay.

    Args:
        comparison: One, or several that stand on one page under a table of all of them.
        folder: Made if it is not there.
        anchors: Show on the page what others published of the same methods.

    Returns:
        The page, `comparison.html`.

    Raises:
        InlayError: No comparison, or a folder that cannot be written.
    """
    comparisons = [comparison] if isinstance(comparison, Comparison) else list(comparison)
    if not comparisons:
        raise BadInput("there is no comparison to save; give at least one.")
    folder = Path(folder).expanduser()
    try:
        if len(comparisons) == 1:
            _save_files(comparisons[0], folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for number, each in enumerate(comparisons, 1):
                _save_files(each, folder / f"{number}_{_shorten_name(each.data)}_{_shorten_name(each.base)}")
            _write_text(folder / TABLE, write_overview_table(comparisons))
        return write_page(comparisons, folder / PAGE, anchors=anchors)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error


def _save_files(comparison: Comparison, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    comparison.write(folder / STORED)
    _write_text(folder / TABLE, write_markdown_table(comparison))
    _write_text(folder / "pros_and_cons.md", write_markdown_kinds(comparison))
    _write_text(folder / "comparison.csv", write_csv_table(comparison))
    for name, canvas in draw_all(comparison).items():
        _write_text(folder / f"{name}.svg", canvas.to_svg())
        with replacing(folder / f"{name}.png") as new:
            canvas.to_image().save(new, optimize=True)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def _shorten_name(name: str) -> str:
    """The end of a name, of letters and digits, as a part of a file's name."""
    last = name.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-.")[:40] or "data"
