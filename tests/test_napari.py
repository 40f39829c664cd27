"""The plug-in for napari: its logic by plain objects, and by napari itself where that is installed."""

import importlib.util
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import yaml

from inlay import BadInput, VolumeSession, load_adapter, segment
from inlay.napari import layers, reader
from inlay.napari.layers import NEGATIVE, Click, LayerSession, choose_colours, find_affine, read_case, read_clicks
from inlay.tasks.colours import colour
from inlay.tasks.volumes.data import Case
from serve.test_tasks import save_channels, save_volumes

FOLDER = Path(layers.__file__).parent
has_napari = importlib.util.find_spec("napari") is not None and importlib.util.find_spec("qtpy") is not None


def needs_napari(test):
    """napari, npe2 and pydantic warn each other of what goes away."""
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")(test)
    return pytest.mark.skipif(not has_napari, reason="no napari with Qt: pip install 'inlay[napari]' PyQt6")(test)


class Unit:
    """A length, as pint's units answer; 0: a pixel."""

    def __init__(self, mm=0.0):
        self.mm = mm

    def is_compatible_with(self, unit):
        return unit == "mm" and self.mm > 0

    def __rmul__(self, count):
        return SimpleNamespace(to=lambda unit: SimpleNamespace(magnitude=count * self.mm))


class PlainLayer:
    """What the logic needs of a layer."""

    def __init__(self, data, transform=None, mm=0.0, name="scan", metadata=None):
        self.data, self.name, self.ndim = data, name, 3
        self.transform = np.eye(4) if transform is None else np.asarray(transform, float)
        self.units, self.metadata = [Unit(mm)] * 3, metadata or {}

    def data_to_world(self, position):
        return self.transform[:3, :3] @ np.asarray(position, float) + self.transform[:3, 3]

    def world_to_data(self, position):
        return np.linalg.solve(self.transform[:3, :3], np.asarray(position, float) - self.transform[:3, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_volumes(tmp_path_factory.mktemp("volumes")) / "b"


@pytest.fixture(scope="module")
def adapter(folder):
    return load_adapter(folder, device="cpu")


@pytest.fixture
def data():
    """D H W, with axes of different length."""
    return np.random.default_rng(0).normal(size=(12, 18, 22)).astype(np.float32)


def test_a_layer_has_its_place_in_ras_and_mm(data):
    layer = PlainLayer(data, np.array([[2.0, 0, 0, 5], [0, 1, 0, 7], [0, 0, 0.5, 9], [0, 0, 0, 1]]))
    case = read_case(layer, "RAS")
    assert case.image.shape == (22, 18, 12) and case.image[3, 4, 5] == data[5, 4, 3]
    assert (case.affine @ [0, 0, 0, 1]).tolist() == [9, 7, 5, 1]  # right, anterior, superior
    assert (case.affine @ [2, 3, 4, 1]).tolist() == [10, 10, 13, 1]
    assert (find_affine(layer, "LPS") @ [2, 3, 4, 1]).tolist() == [-10, -10, 13, 1]
    micrometres = PlainLayer(data, layer.transform, mm=1e-3)
    assert (find_affine(micrometres, "RAS") @ [2, 3, 4, 1])[:3] == pytest.approx([0.01, 0.01, 0.013])


def test_an_oblique_file_stays_where_it_is(tmp_path, data):
    turn, signs = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(0).standard_normal((3, 3)))
    turn *= np.sign(np.diag(signs))  # near to none
    affine = nibabel.affines.from_matvec(turn @ np.diag([-0.5, 1, 2]), [10, -20, 30])
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data.T.copy(), affine), path)
    ((shown, options, kind),) = reader.get_reader(str(path))(str(path))
    assert kind == "image" and np.array_equal(shown, data) and reader.get_reader([str(path)]) is None
    layer = PlainLayer(shown, options["affine"], mm=1.0, metadata=options["metadata"])
    assert np.allclose(find_affine(layer, "RAS"), affine, atol=1e-5)
    # Straight in napari, which slices along the axes of its world, with its spacing and its centre.
    assert np.allclose(options["affine"][:3, :3], np.diag([2, -1, 0.5]), atol=1e-5)
    middle = (np.array(data.shape) - 1) / 2
    centre = nibabel.affines.apply_affine(affine, middle[::-1])
    assert np.allclose(layer.data_to_world(middle)[::-1] * (-1, -1, 1), centre, atol=1e-4)  # left, posterior, superior
    points = PlainLayer(layer.data_to_world((5, 4, 3))[None])
    assert read_clicks(points, layer, ["left"]) == [Click((3, 4, 5), "left")]
    with pytest.raises(BadInput, match=r"layer 'scan' is rotated.*; open its file with inlay's reader"):
        find_affine(PlainLayer(shown, np.linalg.inv(affine)), "RAS")


def test_layers_that_are_no_scans_are_refused(adapter, data):
    for wrong in (data[0], data[None], np.stack([data] * 3, -1)):
        with pytest.raises(BadInput, match=r"layer 'scan' has the shape \(.*\); choose an image of three axes"):
            LayerSession(adapter, PlainLayer(wrong))


def test_layers_on_one_grid_are_the_channels_of_a_scan(data):
    transform = np.diag([2.0, 1, 0.5, 1])
    case = read_case(PlainLayer(data, transform), "RAS", [PlainLayer(data + 1, transform)])
    assert case.image.shape == (2, 22, 18, 12) and np.array_equal(case.image[1], data.T + 1)
    for other in (PlainLayer(data[1:], transform), PlainLayer(data, np.eye(4), name="t1")):
        with pytest.raises(BadInput, match=r"layers 'scan' and '\w+' are not on the same grid; resample one of them"):
            read_case(PlainLayer(data, transform), "RAS", [other])


def test_points_are_clicks_wherever_their_layer_lies(data):
    image = PlainLayer(data, np.array([[2.0, 0, 0, 5], [0, 1, 0, 7], [0, 0, 0.5, 9], [0, 0, 0, 1]]))
    points = PlainLayer(np.array([[15.0, 11, 10.5], [5, 7, 9]]))
    assert read_clicks(points, image, ["left", NEGATIVE]) == [Click((3, 4, 5), "left"), Click((0, 0, 0), NEGATIVE)]


def test_clicks_that_change_are_followed(adapter, data):
    layer = PlainLayer(data, np.diag([2.0, 1, 1, 1]))
    session = LayerSession(adapter, layer, "RAS")
    scan = adapter.processor.read(Case("scan", data.T.copy(), affine=np.diag([1.0, 1, 2, 1])))
    plain = VolumeSession(adapter, scan)
    one, two, three = Click((3, 4, 5), "right"), Click((10, 2, 1), NEGATIVE), Click((12, 9, 6), "left")

    def expected(*clicks):
        plain.reset()
        for click in clicks:
            plain.click(click.point, click.label != NEGATIVE, None if click.label == NEGATIVE else click.label)
        return plain.mask.transpose(2, 1, 0)

    calls = []
    click = session._session.click
    session._session.click = lambda *given: (calls.append(given), click(*given))
    assert np.array_equal(session.follow([one, two]), expected(one, two)) and len(calls) == 2
    assert np.array_equal(session.follow([one, two, three]), expected(one, two, three)) and len(calls) == 3
    assert np.array_equal(session.follow([one, three]), expected(one, three)) and len(calls) == 4
    assert np.array_equal(session.follow([one]), expected(one)) and len(calls) == 4
    assert not session.follow([]).any() and session.names == {1: "left", 2: "right"}
    with pytest.raises(BadInput, match="outside the scan"):
        session.follow([one, Click((99, 0, 0), "left")])
    assert np.array_equal(session.mask, expected(one))


def test_clicks_correct_the_mask_of_the_whole_scan(adapter, data):
    data = np.concatenate([data] * 3, 2)
    session = LayerSession(adapter, PlainLayer(data, np.diag([2.0, 1, 1, 1])), "RAS")
    scan = adapter.processor.read(Case("scan", data.T.copy(), affine=np.diag([1.0, 1, 2, 1])))
    first, second = Click((3, 4, 5), "right"), Click((10, 2, 1), "left")
    whole = session.segment_all([first], largest=True)
    expected = segment(adapter, scan, points=[(3, 4, 5, "right")], largest=True, progress=False)
    assert np.array_equal(whole, expected.mask.transpose(2, 1, 0))
    assert np.array_equal(session.follow([first]), whole)  # it is in the mask, and says nothing more
    plain = VolumeSession(adapter, scan, mask=expected)
    corrected = session.follow([first, second])
    assert np.array_equal(corrected, plain.click((10, 2, 1), True, "left").transpose(2, 1, 0))
    assert 0 < (corrected != whole).mean() < 0.5  # what the click does not reach stays
    assert np.array_equal(session.follow([second]), corrected)
    assert np.array_equal(session.follow([first]), whole) and np.array_equal(session.follow([]), whole)


def test_clicks_correct_what_was_painted(adapter, data):
    session = LayerSession(adapter, PlainLayer(data, np.diag([2.0, 1, 1, 1])), "RAS")
    scan = adapter.processor.read(Case("scan", data.T.copy(), affine=np.diag([1.0, 1, 2, 1])))
    first, second = Click((3, 4, 5), "right"), Click((10, 2, 1), "left")
    painted = session.follow([first]).copy()
    assert np.array_equal(session.follow([first], painted), painted)
    painted[8:, 10:, 15:] = 2
    plain = VolumeSession(adapter, scan, mask=painted.transpose(2, 1, 0))
    expected = plain.click((10, 2, 1), True, "left").transpose(2, 1, 0)
    assert np.array_equal(session.follow([first, second], painted), expected)
    assert np.array_equal(session.follow([first], expected), painted)  # undone: the paint stays
    painted[0, 0, 0] = 7
    with pytest.raises(BadInput, match="the mask holds 7; it may hold 0 and"):
        session.follow([first], painted)


def test_a_mask_is_saved_on_the_grid_of_its_file(adapter, data, tmp_path):
    path, affine = tmp_path / "scan.nii.gz", np.diag([-1.0, 1, 2, 1])
    nibabel.save(nibabel.Nifti1Image(data.T.copy(), affine), path)
    ((shown, options, _),) = reader.open_scan(str(path))
    session = LayerSession(adapter, PlainLayer(shown, options["affine"], mm=1.0, metadata=options["metadata"]))
    mask = np.zeros(data.shape, int)
    mask[5, 4, 3] = 2  # painted over
    saved = nibabel.load(session.save(mask, tmp_path / "mask.nii.gz"))
    assert np.allclose(saved.affine, affine) and np.argwhere(np.asarray(saved.dataobj) == 2).tolist() == [[3, 4, 5]]
    with pytest.raises(BadInput, match="is the scan itself"):
        session.save(mask, path)
    with pytest.raises(BadInput, match="holds the labels 7"):
        session.save(mask + 7 * (mask == 0), tmp_path / "mask.nii.gz")


def test_every_class_has_its_colour():
    colours = choose_colours({4: "tumour", 1: "cyst"})
    assert [tuple(round(c * 255) for c in colours[name]) for name in ("tumour", "cyst")] == [colour(1), colour(2)]
    assert colours[NEGATIVE] == (1, 1, 1)


def test_the_manifest_names_what_is_there():
    manifest = yaml.safe_load((FOLDER / "napari.yaml").read_text())
    names = [command["python_name"] for command in manifest["contributions"]["commands"]]
    assert manifest["name"] == "inlay" and "inlay.napari.reader:get_reader" in names
    for name in names:
        module, attribute = name.split(":")
        assert f"{attribute}" in (FOLDER / f"{module.rpartition('.')[2]}.py").read_text()


@needs_napari
def test_npe2_accepts_the_manifest():
    from npe2 import PluginManifest

    manifest = PluginManifest.from_file(FOLDER / "napari.yaml")
    manifest.validate_imports()
    assert [widget.display_name for widget in manifest.contributions.widgets] == ["Segment a scan"]


@needs_napari
def test_layers_of_napari_are_layers(data):
    from napari.layers import Image, Points

    image = Image(data, scale=(2, 1, 0.5), translate=(5, 7, 9), units=("mm", "mm", "mm"))
    assert (find_affine(image, "RAS") @ [2, 3, 4, 1]).tolist() == [10, 10, 13, 1]
    small = Image(data, scale=(2000, 1000, 500), translate=(5000, 7000, 9000), units=("um", "um", "um"))
    assert np.allclose(find_affine(small, "RAS"), find_affine(image, "RAS"))
    points = Points([[15.0, 11, 10.5]], ndim=3, units=("mm", "mm", "mm"))
    assert read_clicks(points, image, ["left"]) == [Click((3, 4, 5), "left")]


@pytest.fixture
def panel(monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    from napari.components import ViewerModel
    from qtpy.QtWidgets import QApplication

    from inlay.napari.panel import SegmentPanel

    application = QApplication.instance() or QApplication(sys.argv[:1])
    panel = SegmentPanel(ViewerModel())

    def wait():
        end = time.monotonic() + 60
        while panel.is_busy:
            application.processEvents()
            assert time.monotonic() < end

    panel.__dict__["wait"] = wait
    yield panel
    panel.close()


@needs_napari
def test_the_panel_follows_points(panel, folder, adapter, data, tmp_path):
    """Load, choose, click, undo, segment, paint and save, as a user does."""
    viewer = panel._viewer
    image = viewer.add_image(data, name="scan", scale=(2, 1, 1), units=("mm", "mm", "mm"))
    panel._folder.value, panel._device.value = folder, "cpu"
    panel._world.value = "RAS"
    panel.load()
    panel.wait()
    assert panel._scan.value is image and list(panel._new_class.choices) == ["left", "right", NEGATIVE]
    points = viewer.layers["points"]
    panel._new_class.value = "right"
    points.add((10.0, 4, 3))
    panel.wait()
    panel._new_class.value = NEGATIVE
    points.add((2.0, 2, 10))
    panel.wait()
    assert points.features["class"].tolist() == ["right", NEGATIVE]
    assert np.allclose(points.face_color[:, :3] * 255, [colour(2), (255, 255, 255)])
    plain = VolumeSession(adapter, adapter.processor.read(Case("s", data.T.copy(), affine=np.diag([1.0, 1, 2, 1]))))
    first = plain.click((3, 4, 5), True, "right").transpose(2, 1, 0)
    both = plain.click((10, 2, 1), False).transpose(2, 1, 0)
    mask = viewer.layers["scan mask"]
    assert np.array_equal(mask.data, both) and np.allclose(mask.data_to_world((1, 2, 3)), (2, 2, 3))
    assert np.allclose(mask.get_color(2), (*np.array(colour(2)) / 255, 1), atol=0.01)
    assert [layer.name for layer in viewer.layers] == ["scan", "scan mask", "points"]
    assert mask.features["class"].tolist() == [NEGATIVE, "left", "right"]
    panel.undo()
    panel.wait()
    assert np.array_equal(mask.data, first) and len(points.data) == 1
    panel.segment_all()
    panel.wait()
    scan = adapter.processor.read(Case("s", data.T.copy(), affine=np.diag([1.0, 1, 2, 1])))
    whole = segment(adapter, scan, points=[(3, 4, 5, "right")], progress=False).mask
    assert np.array_equal(mask.data, whole.transpose(2, 1, 0))
    mask.data[0, 0, 0] = 1
    painted = mask.data.copy()
    points.add((5.0, 9, 12))
    panel.wait()
    corrected = VolumeSession(adapter, scan, mask=painted.transpose(2, 1, 0)).click((12, 9, 2.5), False)
    assert np.array_equal(mask.data, corrected.transpose(2, 1, 0)) and mask.data[0, 0, 0] == 1
    panel.save(tmp_path / "mask.nii.gz")
    saved = nibabel.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), mask.data)
    assert np.allclose(saved.affine, np.diag([1, 1, 2, 1]))


@needs_napari
def test_the_panel_has_a_choice_for_each_channel(panel, data, tmp_path):
    save_channels(tmp_path)
    panel._folder.value, panel._device.value, panel._world.value = tmp_path / "two", "cpu", "RAS"
    layers = [panel._viewer.add_image(data + i, name=name, scale=(2, 1, 1)) for i, name in enumerate("ab")]
    panel.load()
    panel.wait()
    assert [box.label for box in (panel._scan, *panel._others)] == ["flair", "t1"]
    panel._scan.value, panel._others[0].value = layers
    panel.segment_all()
    panel.wait()
    both = Case("s", np.stack([data.T, data.T + 1]), affine=np.diag([1.0, 1, 2, 1]))
    adapter = load_adapter(tmp_path / "two", device="cpu")
    expected = segment(adapter, adapter.processor.read(both), progress=False).mask
    assert np.array_equal(panel._viewer.layers["a mask"].data, expected.transpose(2, 1, 0))


@needs_napari
def test_the_panel_says_what_is_wrong(panel, data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("inlay.napari.panel.show_error", said.append)
    panel.segment_all()
    panel.save(tmp_path / "mask.nii.gz")
    panel._folder.value = tmp_path
    panel.load()
    panel.wait()
    assert "load an adapter and choose a scan first" in said[0] and "there is no mask yet" in said[1]
    assert len(said) == 3 and str(tmp_path) in said[2]
