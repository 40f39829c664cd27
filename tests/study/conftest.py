"""What the tests of studies share: the smallest data that has all three parts."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def slow_imports() -> None:
    """Before the search for garbage leaves out what is there."""
    import inlay.study.compare  # noqa: F401


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 15 images for each of 3 digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for digit in range(3):
        (folder / str(digit)).mkdir()
        for i in [i for i, label in enumerate(found.target) if label == digit][:15]:
            pixels = (found.images[i] * 15.9).astype("uint8")
            Image.fromarray(pixels).convert("RGB").save(folder / str(digit) / f"{i}.png")
    return folder
