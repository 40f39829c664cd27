"""Images of a Hub dataset, read over the network as they are needed; the Hub is a small one on this machine."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hub.client import online
from hub.server import Repo
from inlay.errors import BadInput, Unreachable
from inlay.tasks.images.stream import load_image_stream
from inlay.tasks.shards import is_held_out
from inlay.train.stream import StreamSampler
from tar_shards import write_tar

COUNT = 80


@pytest.fixture(scope="module")
def images():
    def draw(number):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
        return file.getvalue()

    return [draw(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": [i % 2 for i in range(COUNT)]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    for shard in range(2):
        rows.shard(2, shard).to_parquet(folder / f"train-0000{shard}-of-00002.parquet")
    with online(folder / "cache") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        server.repos["datasets/ann/pets"] = repo = Repo()
        repo.add({file.name: (file.read_bytes(), True) for file in sorted(folder.glob("*.parquet"))}, "parquet")
        write_tar(folder / "train.tar", [(f"{i}", {"png": images[i], "cls": b"%d" % (i % 2)}) for i in range(COUNT)])
        server.repos["datasets/ann/tar"] = repo = Repo()
        repo.add({"train.tar": ((folder / "train.tar").read_bytes(), True)}, "tar")
        yield server


def test_parquet_of_the_hub(hub, images):
    data = load_image_stream("ann/pets")
    assert data.labels == ("even", "odd") and data.train.shards == 2
    held = sorted(image for image in images if is_held_out(image, 0))
    assert sorted(image["bytes"] for image in data.validation["image"]) == held
    sampler = StreamSampler(data.train, 4, 12, 0)
    first = list(sampler)
    again = StreamSampler(data.train, 4, 12, 0, done=5, positions=[sampler.find_position(5)])
    assert list(again) == first[5:]
    assert not any(path.endswith("main/train-00000-of-00002.parquet") for path in hub.calls), "all are of one commit"
    commit = hub.repos["datasets/ann/pets"].head
    assert load_image_stream("ann/pets", revision=commit).labels == data.labels


def test_tar_of_the_hub_needs_its_class_names(hub, tmp_path, images):
    with pytest.raises(BadInput, match="into a file, one a line, and pass it as --classes"):
        load_image_stream("ann/tar")
    (tmp_path / "names.txt").write_text("even\nodd")
    data = load_image_stream("ann/tar", classes=str(tmp_path / "names.txt"))
    assert len(data.validation) + len(data.train.read_first(999)) == COUNT


def test_a_dataset_that_is_not_there(hub):
    with pytest.raises(Unreachable, match="'ann/none' is no file or folder here"):
        load_image_stream("ann/none")
