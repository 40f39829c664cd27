"""Every loader of data takes a pathlib.Path where it takes a text."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inlay import (
    ImageTask,
    InlayError,
    find_pictures,
    load_images,
    load_masks,
    load_sequences,
    load_texts,
    load_trained,
    load_volumes,
    mask_weights,
    prune,
    scan_sensitivity,
)

LOADERS = (load_images, load_masks, load_sequences, load_texts, load_volumes)


def load_from(function, name):
    """What it says of data that is not there."""
    with pytest.raises(InlayError) as caught:
        function(name)
    return str(caught.value)


@pytest.mark.parametrize("function", LOADERS, ids=lambda function: function.__name__)
def test_a_path_that_is_not_there_is_named_as_a_text_is(function, tmp_path):
    assert load_from(function, tmp_path / "none") == load_from(function, str(tmp_path / "none"))


def test_paths_give_what_texts_give(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            values = np.full((4, 4, 3), 40 * i + len(label + label[0] * (label == "dog")), np.uint8)
            Image.fromarray(values).save(tmp_path / "images" / label / f"{i}.png")
    lines = [{"prompt": f"{i} and {i}", "completion": str(2 * i)} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for function, path in ((load_images, tmp_path / "images"), (load_texts, tmp_path / "sums.jsonl")):
        found, wanted = function(path), function(str(path))
        assert type(found.name) is str and found.name == wanted.name
        assert len(found.train) == len(wanted.train) > 0 and len(found.validation) == len(wanted.validation) > 0
    options = ImageTask(model=Path("builtin:vit-tiny"), dataset=tmp_path / "images")
    assert (type(options.model), type(options.dataset)) == (str, str) and options.load(0).source.name
    assert find_pictures([tmp_path / "images/cat", tmp_path / "images/dog/0.png"])[-1] == str(
        tmp_path / "images/dog/0.png"
    )


def test_pruning_takes_paths_of_data(tmp_path):
    model = load_trained("builtin:vit-tiny")
    for function in (prune, scan_sensitivity, lambda *given: mask_weights(*given, criterion="wanda")):
        with pytest.raises(InlayError, match="none"):
            function(model, tmp_path / "none")
