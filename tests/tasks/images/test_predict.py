"""Labels of pictures by path, bytes and image, and what cannot be answered."""

import numpy as np
import pytest
import torch
from PIL import Image

from inlay import InlayError, load_adapter, predict
from inlay.tasks.images.predict import Prediction, draw_sheet, find_pictures


@pytest.fixture(scope="module")
def adapter(digits_adapter):
    return load_adapter(digits_adapter)


def test_predictions_are_the_models_softmax(adapter, pictures):
    files = find_pictures([str(pictures)])
    found = predict(adapter, files, top=10, batch_size=2)
    assert [p.source for p in found] == files and len(files) == 5
    for file, prediction in zip(files, found, strict=True):
        pixels = adapter.processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = adapter.model(pixel_values=pixels).logits[0].softmax(-1)
        assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
        assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)
        for label, value in zip(prediction.labels, prediction.probabilities, strict=True):
            assert value == pytest.approx(float(expected[adapter.labels.index(label)]), abs=1e-5)


def test_paths_bytes_and_images_are_the_same_picture(adapter, pictures):
    path = pictures / "0.png"
    by_path, by_bytes, by_image = predict(adapter, [path, path.read_bytes(), Image.open(path)], top=1)
    assert by_path.probabilities == pytest.approx(by_bytes.probabilities)
    assert by_path.probabilities == pytest.approx(by_image.probabilities)
    assert (by_path.source, by_bytes.source, by_image.source) == (str(path), "image 1", "image 2")


def test_merged_adapter_gives_the_same_probabilities(digits_adapter, pictures):
    plain, merged = load_adapter(digits_adapter), load_adapter(digits_adapter).merge()
    files = find_pictures([str(pictures)])
    for a, b in zip(predict(plain, files), predict(merged, files), strict=True):
        assert a.labels == b.labels and a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_mistakes_are_named(adapter, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(InlayError, match=r"broken\.jpg"):
        predict(adapter, [tmp_path / "broken.jpg"])
    with pytest.raises(InlayError, match="at least 1"):
        predict(adapter, [], top=0)
    with pytest.raises(InlayError, match="nowhere"):
        find_pictures(["nowhere.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InlayError, match="holds no images"):
        find_pictures([str(tmp_path / "empty")])
    assert predict(adapter, []) == []


def test_sheet_shows_every_picture(tmp_path):
    colours = ["red", "lime", "blue", "orange", "purple"]
    images = [Image.new("RGB", (10 + i, 20), colour) for i, colour in enumerate(colours)]
    labels = [Prediction(str(i), ["a label that is much too long for its place", "b"], [0.75, 0.25]) for i in range(5)]
    sheet = Image.open(draw_sheet(labels, images, tmp_path / "sheet.png", columns=3))
    assert sheet.size == (3 * 172 + 12, 2 * 212 + 12)
    seen = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {image.getpixel((0, 0)) for image in images} <= seen


def test_images_are_decoded_ahead_in_their_order(adapter, tmp_path):
    """In threads: the answers are those of one image after the other, and the first that is damaged is named."""
    files = []
    for i in range(9):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    opened = Image.open(files[3])  # one object twice: Pillow loads it in one thread at a time
    found = predict(adapter, [*files, opened, opened], batch_size=2, top=2)
    assert [one.source for one in found] == [*files, "image 9", "image 10"]
    for one, source in zip(found, [*files, files[3], files[3]], strict=True):
        (single,) = predict(adapter, [source], top=2)
        assert one.labels == single.labels and one.probabilities == pytest.approx(single.probabilities, abs=1e-6)
    for i in (4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InlayError, match=r"4\.png' cannot be read as an image: not an image"):
        predict(adapter, files, batch_size=2)
