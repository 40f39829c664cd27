"""A folder of images so small that a trial on it takes a tenth of a second."""

import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """15 images for each of 3 digits: the smallest data with all parts."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for digit in range(3):
        (folder / str(digit)).mkdir()
        for i in [i for i, label in enumerate(found.target) if label == digit][:15]:
            pixels = (found.images[i] * 15.9).astype("uint8")
            Image.fromarray(pixels).convert("RGB").save(folder / str(digit) / f"{i}.png")
    return folder
