"""What the tests of studies share: the smallest data that has all three parts."""

import gc
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def old_objects_are_passed_over() -> None:
    """Each training ends with a search for garbage, which takes longer than these trainings: imports are left out."""
    import inlay.study.compare  # noqa: F401

    gc.collect()
    gc.freeze()


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
