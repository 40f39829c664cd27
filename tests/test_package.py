"""What a wheel holds: every file of the package, also those that are no Python."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "src/inlay"


def list_files(*options):
    found = subprocess.run(
        ["git", "ls-files", *options, PACKAGE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("no git repository, which knows the files of the package")
    return {line.removeprefix(f"{PACKAGE}/") for line in found.stdout.splitlines()}


def test_no_file_of_the_package_is_left_out_of_a_wheel():
    """Hatchling takes all of the package, but for what .gitignore or a setting leaves out."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        build = tomllib.load(file)["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": [PACKAGE]}}}, "a setting may leave files out"
    assert list_files("--cached", "--ignored", "--exclude-standard") == set(), "hatchling leaves out what git ignores"
    needed = {"napari/napari.yaml", "serve/server/page.html", "tasks/volumes/niivue/viewer.html"}
    assert needed | {"tasks/volumes/niivue/niivue.umd.js", "builtin/sam-tiny/model.safetensors"} <= list_files()
