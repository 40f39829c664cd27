"""What the recipes of image classifiers train on where the data are not what is tested."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of 60 images, of 3 labels and of 2: after an epoch of two steps, few are left to evaluate."""
    folder = tmp_path_factory.mktemp("tasks")
    for i in range(60):
        first, second = folder / "digits" / str(i % 3), folder / "shapes" / "ab"[i % 2]
        for where, colour in ((first, (85 * (i % 3), i, 0)), (second, (0, i, 255 * (i % 2)))):
            where.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(where / f"{i}.png")
    return folder / "digits", folder / "shapes"
