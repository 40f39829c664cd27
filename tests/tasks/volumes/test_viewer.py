"""The page of a segmentation, as a browser shows it, and the montage beside it."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageCms

from inlay import InlayError
from inlay.tasks.colours import COLOURS, colour
from inlay.tasks.volumes.formats import write_volume
from inlay.tasks.volumes.montage import LARGE, draw_montage
from inlay.tasks.volumes.segment import Segmentation, read_reference
from inlay.tasks.volumes.viewer import NIIVUE, _thinning_steps, write_viewer

CHROMIUM = shutil.which("chromium")
# Left-posterior-superior with x and y swapped; voxels of 2 x 0.5 x 1 mm along x, y, z of the file.
AFFINE = np.array([[0, -0.5, 0, 20.0], [-2.0, 0, 0, 30.0], [0, 0, 1.0, -5.0], [0, 0, 0, 1.0]])


@pytest.fixture
def scan():
    return np.random.default_rng(0).normal(100, 10, (20, 60, 24)).astype(np.float32)


@pytest.fixture
def mask():
    """Class 1 in the patient's right and anterior half: low x and y of the file."""
    mask = np.zeros((20, 60, 24), np.uint8)
    mask[2:6, 5:20, 10:18] = 1
    return mask


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(picture, k):
    """Rows and columns of an outline's colour in the axial plane: the first square."""
    return np.argwhere((picture[:, : LARGE + 20] == colour(k)).all(-1)[34 : LARGE + 34])


def test_outlines_lie_where_the_mask_is(tmp_path, scan, mask):
    picture = pixels(draw_montage(scan, Segmentation(mask, AFFINE, ["a"]), tmp_path / "m.png"))
    rows, columns = places(picture, 1).T
    # The axial plane is 40 mm high (x of the file) and 30 wide (y); in a square of LARGE pixels, radiological.
    scale = LARGE / 40
    left = 12 + (LARGE - 30 * scale) / 2
    assert rows.min() == pytest.approx(2 * 2 * scale, abs=2) and rows.max() == pytest.approx(6 * 2 * scale, abs=2)
    assert columns.min() == pytest.approx(left + 5 * 0.5 * scale, abs=2)
    assert columns.max() == pytest.approx(left + 20 * 0.5 * scale, abs=2)


def test_each_class_has_its_colour(tmp_path, scan, mask):
    mask[12:16, 30:50, 10:18] = 9
    labels = [f"class {i} with a rather long name" for i in range(1, 13)]
    picture = pixels(draw_montage(scan, Segmentation(mask, AFFINE, labels), tmp_path / "m.png"))
    assert len(places(picture, 1)) > 100 and len(places(picture, 9)) > 100 and not len(places(picture, 2))
    assert len({colour(k) for k in range(1, 100)}) == 99 and colour(1) == (255, 90, 54) and COLOURS[0] == "#ff5a36"


def test_the_legend_names_every_class(tmp_path, scan, mask):
    mask[12:16, 30:50, 10:18] = 31
    labels = [*(f"class {i}" for i in range(1, 32)), "a name that is longer than the sheet is wide " * 4]
    picture = pixels(draw_montage(scan, Segmentation(mask, AFFINE, labels), tmp_path / "m.png"))
    squares = [(picture[660:, :, :] == colour(k)).all(-1).sum() for k in range(1, 33)]
    assert min(squares) >= 13 * 13
    few = pixels(draw_montage(scan, Segmentation(mask.clip(0, 1), AFFINE, labels[:2]), tmp_path / "m.png"))
    assert few.shape[0] < picture.shape[0] and few.shape[1] == picture.shape[1]


def test_32_classes_have_colours_that_can_be_told_apart():
    row = Image.new("RGB", (32, 1))
    row.putdata([colour(k) for k in range(1, 33)])
    profiles = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    lab = np.asarray(ImageCms.applyTransform(row, ImageCms.buildTransform(*profiles, "RGB", "LAB")))[0]
    lab = np.stack([lab[:, 0] * (100 / 255), *lab[:, 1:].view(np.int8).T.astype(float)], -1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(32)
    assert apart.min() > 18  # CIE76; a just noticeable difference is 2.3
    assert np.hypot(*lab[:, 1:].T).min() > 30, "a colour is nearly grey"


def test_a_reference_is_drawn_dashed_where_it_is(tmp_path, scan, mask):
    reference = np.zeros_like(mask)
    reference[12:16, 30:50, 10:18] = 2
    labels, numbers = ["a", "b"], (2000, 4)
    picture = pixels(draw_montage(scan, Segmentation(mask, AFFINE, labels), tmp_path / "m.png", reference=reference))
    axial = picture[34 : LARGE + 34, : LARGE + 20]
    rows, columns = np.argwhere((axial[60:] == 255).all(-1)).T  # below the letter A
    scale = LARGE / 40
    left = 12 + (LARGE - 30 * scale) / 2
    inside = (rows + 60 > 12 * 2 * scale - 3) & (rows + 60 < 16 * 2 * scale + 3)
    inside &= (columns > left + 30 * 0.5 * scale - 3) & (columns < left + 50 * 0.5 * scale + 3)
    perimeter = 2 * (4 * 2 + 20 * 0.5) * scale
    assert inside.sum() == pytest.approx(perimeter, rel=0.15)  # two pixels thick, half of them dashes
    assert len(places(picture, 1)) > 100
    found = Segmentation(np.array([0, 2000, 4])[mask], AFFINE, labels, values=numbers)
    renumbered = np.array([0, 2000, 4])[reference]
    again = pixels(draw_montage(scan, found, tmp_path / "m.png", reference=renumbered))
    assert np.array_equal(picture, again)
    with pytest.raises(InlayError, match="holds the labels 2; it may hold 0, 2000, 4"):
        draw_montage(scan, found, tmp_path / "m.png", reference=reference)
    with pytest.raises(InlayError, match=r"shapes \(19, 60, 24\) and \(20, 60, 24\); pass two of the same scan"):
        draw_montage(scan, found, tmp_path / "m.png", reference=renumbered[1:])


def test_other_numbers_of_the_classes_change_neither_colours_nor_places(tmp_path, scan, mask):
    mask[12:16, 30:50, 10:18] = 2
    plain = Segmentation(mask, AFFINE, ["a", "b"])
    other = Segmentation(np.array([0, 2000, 4])[mask], AFFINE, ["a", "b"], values=(2000, 4))
    one, two = (pixels(draw_montage(scan, found, tmp_path / "m.png")) for found in (plain, other))
    assert np.array_equal(one, two)
    (_, first, _, label), (_, second, _, again) = (
        content(write_viewer(scan, found, tmp_path / "v.html")) for found in (plain, other)
    )
    assert np.array_equal(np.asarray(label.dataobj), np.asarray(again.dataobj))
    assert [[c["value"] for c in data["classes"]] for data in (first, second)] == [[1, 2], [2000, 4]]
    assert [c["volume"] for c in first["classes"]] == [c["volume"] for c in second["classes"]]


def test_empty_ring_and_tiny_masks_are_drawn(tmp_path, scan, mask):
    for change in (lambda m: m * 0, lambda m: np.pad(np.zeros((18, 58, 22), np.uint8), 1, constant_values=1)):
        draw_montage(scan, Segmentation(change(mask), AFFINE, ["a"]), tmp_path / "m.png")
    one = mask * 0
    one[19, 59, 23] = 1
    assert len(places(pixels(draw_montage(scan, Segmentation(one, AFFINE, ["a"]), tmp_path / "m.png")), 1))
    flat = Segmentation(one[:, :, 23:], AFFINE, ["a"])
    draw_montage(scan[:, :, 23:] * 0, flat, tmp_path / "m.png")


def content(path):
    """What the page holds: the settings, image and mask."""
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    images = [nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(data[k]))) for k in ("image", "mask")]
    return text, data, *images


def test_the_page_holds_scan_and_mask(tmp_path, scan, mask):
    labels = ["tumour</script><script>alert(1)</script>", "<b>&"]
    path = write_viewer(scan, Segmentation(mask, AFFINE, labels), tmp_path / "v.html", name="<i>scan</script>")
    text, data, image, label = content(path)
    assert np.abs(image.get_fdata() - scan).max() < 0.01 and image.get_data_dtype() == np.int16
    assert np.array_equal(np.asarray(label.dataobj), mask) and label.get_data_dtype() == np.uint8
    assert np.allclose(image.affine, AFFINE) and np.allclose(label.affine, AFFINE)
    assert [one["name"] for one in data["classes"]] == labels and data["classes"][0]["volume"] == "0.48 ml"
    assert (np.array(data["inverse"]) @ [*data["centre"], 1]).round().astype(int).tolist() in np.argwhere(mask).tolist()
    assert text.count("</script") == 3 and "<i>" not in text and "alert(1)</script" not in text
    assert "Redistribution and use" in text and not re.findall(
        r"<(?:script|link|img)[^>]* (?:src|href)=", text.split("@@")[0]
    )
    assert len(text) < 2.6e6


def test_a_second_mask_is_on_the_page(tmp_path, scan, mask):
    reference = np.array([0, 4])[np.roll(mask, 1, 0)]
    found = Segmentation(np.array([0, 2000, 4])[mask], AFFINE, ["a", "b"], values=(2000, 4))
    _, data, _, _ = content(write_viewer(scan, found, tmp_path / "v.html", reference=reference))
    second = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(data["reference"])))
    assert np.array_equal(np.asarray(second.dataobj), np.roll(mask, 1, 0) * 2)
    assert [(one["volume"], one["reference"]) for one in data["classes"]] == [("0.48 ml", "0"), ("0 ml", "0.48")]
    path = tmp_path / "r.nii.gz"
    write_volume(path, reference, AFFINE)
    assert np.array_equal(read_reference(path, found), reference)
    write_volume(path, reference, AFFINE + np.eye(4)[:, [3, 0, 1, 2]])
    with pytest.raises(InlayError, match="is not on the scan's grid: its affine moves a corner by"):
        read_reference(path, found)
    write_volume(path, reference * 2, AFFINE)
    with pytest.raises(InlayError, match="holds the labels 8; it may hold 0, 2000, 4"):
        read_reference(path, found)


def test_whole_numbers_stay_what_they_are(tmp_path, scan, mask):
    for array, dtype in ((scan.round(), np.uint8), (scan.round() * 50 - 1024, np.int16)):
        _, _, image, _ = content(write_viewer(array, Segmentation(mask, AFFINE, ["a"]), tmp_path / "v.html"))
        assert image.get_data_dtype() == dtype and np.array_equal(image.get_fdata(), array)


def test_large_scans_are_thinned_out(tmp_path, scan, mask, monkeypatch):
    assert _thinning_steps((512, 512, 600), np.array([0.7, 0.7, 1.0])) == [2, 2, 2]
    assert _thinning_steps((512, 512, 100), np.array([0.7, 0.7, 5.0])) == [1, 1, 1]
    monkeypatch.setattr("inlay.tasks.volumes.viewer.VOXELS", 15_000)
    _, data, image, label = content(write_viewer(scan, Segmentation(mask, AFFINE, ["a"]), tmp_path / "v.html"))
    assert image.shape == label.shape == (20, 30, 24) and "every 1, 2, 1 voxels" in data["note"]
    assert np.allclose(image.affine @ [3, 4, 5, 1], AFFINE @ [3, 8, 5, 1])
    assert np.array_equal(np.asarray(label.dataobj), mask[:, ::2])


def test_the_bundle_is_the_published_one():
    import hashlib

    licences = (NIIVUE / "LICENSES.txt").read_text(encoding="utf-8")
    assert hashlib.sha256((NIIVUE / "niivue.umd.js").read_bytes()).hexdigest() in licences


def test_mistakes_are_named(tmp_path, scan, mask):
    right = Segmentation(mask, AFFINE, ["a"])
    for write, suffix in ((draw_montage, "png"), (write_viewer, "html")):
        with pytest.raises(InlayError, match=rf"ending with \.{suffix}"):
            write(scan, right, tmp_path / "x.txt")
        with pytest.raises(InlayError, match="folder that exists"):
            write(scan, right, tmp_path / "none" / f"x.{suffix}")
        with pytest.raises(
            InlayError, match=r"shapes \(19, 60, 24\) and \(20, 60, 24\); pass the scan that was segmented"
        ):
            write(scan[1:], right, tmp_path / f"x.{suffix}")
    assert list(tmp_path.iterdir()) == []


def browse(tmp_path, option, path):
    options = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,700", "--virtual-time-budget=10000"]
    return subprocess.run([CHROMIUM, *options, option, path.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_a_page_opens_in_the_mask_of_an_oblique_scan(tmp_path, scan, mask):
    turn, _ = np.linalg.qr(np.eye(3) + 0.2 * np.random.default_rng(0).standard_normal((3, 3)))
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    mask[12:16, 30:50, 10:18] = 2
    reference = np.roll(mask, 1, 0)
    found = Segmentation(mask, affine, ["tumour", "cyst"])
    path = write_viewer(scan, found, tmp_path / "v.html", reference=reference)
    text, data, _, _ = content(path)
    voxel = (np.array(data["inverse"]) @ [*data["centre"], 1]).round().astype(int)
    use, end = text.rsplit("</body>", 1)
    path.write_text(f"{use}<script>{SWITCHING}</script></body>{end}", encoding="utf-8")
    page = browse(tmp_path, "--dump-dom", path).stdout
    told = re.sub(r"<[^>]*>", "", re.search(r'<p id="here".*?>(.*?)</p>', page, re.S)[1])
    names = ["background", "1 tumour", "2 cyst"]
    here = f"mask {names[mask[tuple(voxel)]]}, reference {names[reference[tuple(voxel)]]}"
    assert ",".join(map(str, voxel)) in told.replace(" ", "") and told.endswith(here)
    counts = json.loads(html.unescape(re.search(r'data-counts="(.*?)"', page)[1]))
    ones, twos = (mask == 1).sum(), (mask == 2).sum()
    assert counts["both"] == [ones + twos, outline_size(reference, voxel)]
    assert counts["cyst"] == [twos, outline_size(reference * (reference == 2), voxel)]
    assert counts["filled"] == [twos, twos] and counts["none"] == [0, 0] and counts["all"] == [ones + twos] * 2
    assert counts["opacity"] == [0.5, 0]


SWITCHING = """
const wait = setInterval(() => {
  if (!document.body.dataset.shown) return;
  clearInterval(wait);
  const counts = {}, boxes = document.querySelectorAll("#legend input"), style = document.getElementById("style");
  const count = (name) => { counts[name] = viewer.volumes.slice(1).map((one) => one.img.filter((k) => k).length); };
  count("both");
  boxes[0].click();
  count("cyst");
  style.value = "filled";
  style.dispatchEvent(new Event("change"));
  count("filled");
  document.getElementById("none").click();
  count("none");
  document.getElementById("all").click();
  count("all");
  document.getElementById("reference-shown").click();
  counts.opacity = viewer.volumes.slice(1).map((one) => one.opacity);
  document.body.dataset.counts = JSON.stringify(counts);
}, 50);
"""


def outline_size(mask, at):
    """Pixels of the three planes through a voxel that touch another value within their plane."""
    traced = np.zeros(mask.shape, bool)
    for axis in range(3):
        plane = np.take(mask, at[axis], axis)
        framed = np.pad(plane, 1, mode="edge")
        same = [framed[2:, 1:-1], framed[:-2, 1:-1], framed[1:-1, 2:], framed[1:-1, :-2]]
        traced[(*[slice(None)] * axis, at[axis])] |= (plane > 0) & np.any([side != plane for side in same], 0)
    return int(traced.sum())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_a_browser_shows_scan_and_mask_from_the_disk(tmp_path, scan, mask):
    scan[mask == 1] += 100
    path = write_viewer(scan, Segmentation(mask, AFFINE, ["tumour"]), tmp_path / "v.html")
    shot = tmp_path / "shot.png"
    done = browse(tmp_path, f"--screenshot={shot}", path)
    assert shot.exists(), done.stderr[-2000:]
    picture = pixels(shot)[:, :720]
    grey = (np.ptp(picture, axis=-1) < 8) & (picture.mean(-1) > 35)
    reddish = (picture[..., 0] > picture[..., 1] + 40) & (picture[..., 0] > picture[..., 2] + 40)
    assert grey.mean() > 0.2 and reddish.mean() > 0.01, "scan or mask is not shown"
