"""The recipe for volumes as a user runs it, and what is done with its adapter from the command line."""

import json
import runpy
import sys

import numpy as np
import pytest

from inlay import load_adapter, load_volumes, read_adapter
from inlay.cli.app import app
from inlay.tasks.volumes.formats import read_volume, write_volume
from places import ROOT

SHORT = ["--crop", 16, 16, 16, "--width", 8, "--epochs", 0.11, "--batch_size", 2, "--workers", 0]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "spatial_sam.py"), *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / "spatial_sam.py"), run_name="__main__")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Five of the embedded scans as NIfTI files, cut to be small, one of them alone."""
    folder = tmp_path_factory.mktemp("scans")
    for name in ("images", "labels"):
        (folder / "train" / name).mkdir(parents=True)
    for i, case in enumerate(load_volumes("builtin:volumes").train[:5]):
        cut = tuple(slice(n // 2 - 9, n // 2 + 9) for n in case.image.shape)
        where = folder / "train" if i else folder
        write_volume((where / "images" if i else where) / f"{case.name}.nii.gz", case.image[cut], case.affine)
        if i:
            write_volume(where / "labels" / f"{case.name}.nii.gz", case.label[cut], case.affine)
    return folder


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "--dataset", scans / "train", "--output_dir", folder, *SHORT)
    return folder / "adapter"


def test_it_trains_measures_and_saves(trained):
    file = read_adapter(trained)
    assert file.base_name == "builtin:sam-tiny" and file.labels == ["class 1", "class 2"]
    assert 0 <= file.metrics["validation"]["dice"] <= 1 and file.metrics["cost"]["mmacs"] > 0
    assert file.bytes_weights <= 4 * file.metrics["cost"]["trainable_parameters"] + 30_000
    assert load_adapter(trained).deviation < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quantize", "8bit", "--optimizer", "adamw8bit"],
        ["--gradient_checkpointing", "--accumulate", 2, "--token", 8, "--spacing_mm", 3, 1, 1],
    ],
)
def test_on_an_8_bit_base_and_in_little_memory(monkeypatch, capsys, scans, tmp_path, arguments):
    run(monkeypatch, "--dataset", scans / "train", "--output_dir", tmp_path / "run", *SHORT, *arguments)
    assert "memory: base " in capsys.readouterr().out
    loaded = load_adapter(tmp_path / "run" / "adapter")
    assert loaded.file.config["enlarge"] == (1 if "--token" in arguments else 2)


def test_a_scan_is_segmented_from_the_command_line(trained, scans, tmp_path, capsys):
    from typer.testing import CliRunner

    (scan,) = scans.glob("*.nii.gz")
    paths = {suffix: tmp_path / f"out{suffix}" for suffix in (".nii.gz", ".png", ".html")}
    arguments = ["segment", str(trained), str(scan), "-o", str(paths[".nii.gz"]), "--json", "--point", "9,9,9"]
    result = CliRunner().invoke(app, [*arguments, "--montage", str(paths[".png"]), "--html", str(paths[".html"])])
    assert result.exit_code == 0, result.output
    image, affine = read_volume(scan)
    mask, own = read_volume(paths[".nii.gz"], key="label")
    assert mask.shape == image.shape and np.allclose(own, affine) and set(np.unique(mask)) <= {0, 1, 2}
    assert all(path.stat().st_size > 1000 for suffix, path in paths.items() if suffix != ".nii.gz")
    assert set(json.loads(result.stdout)["volumes_ml"]) == {"class 1", "class 2"}


def test_a_mistake_is_one_sentence(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, "--token", 3, "--output_dir", tmp_path / "run", *SHORT)
    err = capsys.readouterr().err
    assert status.value.code == 2 and "Traceback" not in err and "divisor of SAM's patch" in err
