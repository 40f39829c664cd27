"""A web page that shows a scan and its mask, in one file: NiiVue, scan and mask are in it, and no server is needed."""

import base64
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import BadInput
from inlay.files.atomic import replacing
from inlay.tasks.colours import colour
from inlay.tasks.volumes.montage import find_extent, grey_range
from inlay.tasks.volumes.segment import Segmentation, check_output, class_values

PAGES = (".html",)
VOXELS = 2**25  # larger scans are thinned out for the page
NIIVUE = Path(__file__).with_name("niivue")  # the bundle with its licences, and the page around it


def write_viewer(
    image: np.ndarray,
    segmentation: Segmentation,
    path: str | Path,
    *,
    name: str = "",
    reference: np.ndarray | None = None,
) -> Path:
    """Save a page with three planes and a volume, sliders for slice and opacity, and a switch for each class.

    It opens from the disk in any browser with WebGL 2, and says for every voxel its x, y, z on the scan's own grid, as
    `segment` takes points. Values are stored with 16 bits; of scans over 2²⁵ voxels only every second or further voxel
    along the densest axes is kept.

    Args:
        image: The scan (X, Y, Z) on the mask's grid, as `read_volume` reads it.
        segmentation: From `segment`, or `VolumeSession.segmentation`.
        path: Ends with .html.
        name: Heading; default the scan's file.
        reference: A second mask (X, Y, Z) with the same numbers (`segmentation.names`), shown as white outlines or
            filled.

    Raises:
        InlayError: Image and masks differ in shape, a reference with numbers of no class, another suffix, or no such
            folder.

    Source: NiiVue 0.69.0 (BSD-2-Clause), https://github.com/niivue/niivue.
    """
    path, mask, affine = check_output(path, PAGES), segmentation.class_mask, segmentation.affine
    if image.shape != mask.shape:
        got = f"{image.shape} and {mask.shape}"
        raise BadInput(f"image and mask have the shapes {got}; pass the scan that was segmented.")
    name = name or (segmentation.source.name if isinstance(segmentation.source, Path) else "scan")
    steps = _thinning_steps(image.shape, np.linalg.norm(affine[:3, :3], axis=0))
    thin, grid = tuple(slice(None, None, step) for step in steps), affine @ np.diag([*steps, 1])
    note = "" if max(steps) == 1 else f"Thinned out: every {steps[0]}, {steps[1]}, {steps[2]} voxels along x, y, z."
    volumes, values = segmentation.volumes_ml, class_values(segmentation.labels, segmentation.values)
    second = None if reference is None else segmentation.with_mask(reference)
    others = dict.fromkeys(volumes) if second is None else second.volumes_ml
    seen = mask if second is None else (mask > 0) | (second.class_mask > 0)
    data = {
        "name": name,
        "note": note,
        "classes": [
            {
                "name": name,
                "value": value,
                "volume": f"{volume:.3g} ml",
                "reference": None if others[name] is None else f"{others[name]:.3g}",
                "colour": colour(k),
            }
            for k, (value, (name, volume)) in enumerate(zip(values, volumes.items(), strict=True), 1)
        ],
        "greys": grey_range(image),
        "centre": (affine @ [*find_extent(seen)[0], 1])[:3].tolist(),
        "steps": steps,
        "inverse": np.linalg.inv(affine)[:3].tolist(),
        "image": _encode_nifti(_shrink_type(image[thin]), grid),
        "mask": _encode_nifti(mask[thin], grid),
        "reference": None if second is None else _encode_nifti(second.class_mask[thin], grid),
    }
    with replacing(path) as new:
        new.write_text(render_page(name, data), encoding="utf-8")
    return path


def render_page(title: str, data: dict[str, Any]) -> str:
    """The HTML with everything in it; nothing of a name or label can end a script or begin a tag."""
    bundle = (NIIVUE / "niivue.umd.js").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "LICENCES": html.escape((NIIVUE / "LICENSES.txt").read_text(encoding="utf-8")),
        "NIIVUE": re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    template = (NIIVUE / "viewer.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template)


def _thinning_steps(shape: tuple[int, ...], spacing: np.ndarray) -> list[int]:
    """Of how many voxels one is kept along x, y, z: the densest axis is halved until few enough are left."""
    steps = [1, 1, 1]
    while np.prod([-(-n // step) for n, step in zip(shape, steps, strict=True)]) > VOXELS:
        steps[int(np.argmin(spacing * steps))] *= 2
    return steps


def _shrink_type(image: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest type that holds them; others as they are."""
    low, high = float(image.min()), float(image.max())
    if low < -(2**15) or high >= 2**15 or not np.array_equal(image, np.rint(image)):
        return image
    return image.astype(np.uint8 if low >= 0 and high < 256 else np.int16)


def _encode_nifti(array: np.ndarray, affine: np.ndarray) -> str:
    """A .nii.gz in base 64; floats are scaled to 16 bits."""
    import nibabel

    image = nibabel.Nifti1Image(array, affine)
    if array.dtype.kind == "f":
        image.set_data_dtype(np.int16)
    return base64.b64encode(gzip.compress(image.to_bytes(), compresslevel=6)).decode("ascii")
