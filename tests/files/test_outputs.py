"""An output that cannot be written is refused before the work, by every verb that writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from inlay import combine, evaluate, import_adapter, merge
from inlay.adapters.hub.index import write_index
from inlay.adapters.hub.repository import pull_adapter
from inlay.cli import app as cli
from inlay.errors import BadInput, InlayError
from inlay.files.outputs import check_output_file, check_output_folder
from inlay.tasks import TASKS

NOWHERE = Path("/proc/self")  # takes no file from anyone, root included

needs_proc = pytest.mark.skipif(not NOWHERE.is_dir(), reason="there is no /proc that refuses files here")


def test_what_can_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    for path in (tmp_path / "new.csv", tmp_path / "there" / "old"):
        assert check_output_file(path) == path
    for path in (tmp_path / "new", tmp_path / "a" / "b" / "c", tmp_path / "there"):
        assert check_output_folder(path) == path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "there"]
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert check_output_folder(tmp_path / "link").is_dir()


@needs_proc
@pytest.mark.parametrize(
    ("check", "path", "says"),
    [
        (check_output_file, "{tmp}/none/a.csv", "there is no folder '{tmp}/none' for 'a.csv'"),
        (check_output_file, "{tmp}/folder", "is a folder"),
        (check_output_file, "{tmp}/file/a.csv", "there is no folder '{tmp}/file'"),
        (check_output_file, "/proc/self/a.csv", "nothing can be written in '/proc"),
        (check_output_file, "{tmp}/" + 250 * "a", "File name too long"),
        (check_output_folder, "{tmp}/file", "is a file; name a folder"),
        (check_output_folder, "{tmp}/file/a/b", "'{tmp}/file' is a file"),
        (check_output_folder, "/proc/self/a/b", "nothing can be written in '/proc"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, check, path, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InlayError) as caught:
        check(path.format(tmp=tmp_path))
    assert says.format(tmp=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a model or an adapter is loaded, or the Hub asked."""

    def refuse(*_, **__):
        raise AssertionError("the work has begun")

    for name in (
        "inlay.adapters.load.load_adapter", "inlay.combine.merge.load_adapter", "inlay.combine.make_sums",
        "inlay.adapters.convert.convert.read_adapter", "inlay.adapters.hub.repository.download",
        "inlay.adapters.hub.index.render_index", "inlay.adapters.evaluate.load_adapter",
    ):  # fmt: skip
        monkeypatch.setattr(name, refuse)


@needs_proc
def test_library_functions_check_first(no_work, digits_adapter):
    for write in (
        lambda out: merge(digits_adapter, out),
        lambda out: combine({str(digits_adapter): 1.0}, out=out),
        lambda out: import_adapter(str(digits_adapter), out),
        lambda out: pull_adapter("someone/something", out),
    ):
        with pytest.raises(InlayError, match="nothing can be written in '/proc"):
            write(NOWHERE / "out")
    with pytest.raises(InlayError, match="nothing can be written in '/proc"):
        write_index(NOWHERE)


@needs_proc
@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "{adapter}", "scan.nii.gz", "-o", "/proc/self/m.nii.gz"],
        ["segment", "{adapter}", "scan.nii.gz", "-o", "{tmp}/m.nii", "--montage", "/proc/self/m.png"],
        ["segment", "{adapter}", "scan.nii.gz", "-o", "{tmp}/m.nii", "--html", "/proc/self/m.html"],
        ["evaluate", "{adapter}", "builtin:digits", "--csv", "/proc/self/m.csv"],
        ["evaluate", "{adapter}", "builtin:digits", "--matrix", "/proc/self/m.png"],
        ["combine", "{adapter}", "--report", "/proc/self/m.png"],
        ["combine", "{adapter}", "-o", "/proc/self/out"],
        ["merge", "{adapter}", "-o", "/proc/self/out"],
        ["import", "{adapter}", "-o", "/proc/self/out"],
        ["pull", "someone/something", "-o", "/proc/self/out"],
        ["index", "/proc/self"],
    ],
)
def test_verbs_check_first(no_work, digits_adapter, tmp_path, monkeypatch, capsys, arguments):
    given = [text.format(adapter=digits_adapter, tmp=tmp_path) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["inlay", *given])
    with pytest.raises(SystemExit) as status:
        cli.main()
    err = capsys.readouterr().err
    assert status.value.code == 2 and "nothing can be written in '/proc" in err and err.count("\n") == 1


@needs_proc
def test_predict_checks_first(pictures):
    given = {"top": 1, "group": None, "grid": NOWHERE / "m.png", "overlay": NOWHERE / "m.png", "out": None}
    given |= {"point": None, "negative": None, "box": None}
    for task, inputs in (("image-classification", [str(pictures)]), ("mask-generation", ["a.png"])):
        with pytest.raises(InlayError, match="nothing can be written in '/proc"):
            TASKS[task].prepare(inputs, given)
    with pytest.raises(InlayError, match="nothing can be written in '/proc"):
        TASKS["volume-segmentation"].prepare(["a.nii"], {"out": NOWHERE / "m.nii"})


def test_scores_are_written_only_where_the_adapter_can_be(no_work, digits_adapter, monkeypatch):
    def refuse(folder, name):
        raise BadInput(f"nothing can be written in {folder}.")

    monkeypatch.setattr("inlay.files.outputs._try_to_write", refuse)
    with pytest.raises(InlayError, match="nothing can be written in"):
        evaluate(digits_adapter, "builtin:digits", write=True)


@needs_proc
def test_a_recipe_checks_its_folder_before_torch_is_imported():
    code = (
        "import sys; from inlay import TrainConfig, run_recipe\n"
        "def main(train: TrainConfig): raise AssertionError\n"
        "sys.argv[1:] = ['--output_dir', '/proc/self/run']\n"
        "try:\n    run_recipe(main, TrainConfig())\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nothing can be written in '/proc" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
