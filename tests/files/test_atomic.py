"""A folder is written whole or not at all, whatever ends the process."""

import multiprocessing
import os
import signal
import stat
import time

import pytest

from inlay.errors import BadInput
from inlay.files.atomic import lock_folder, pending_folder, recover, replacing, write_json, writing


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fill(folder, text):
    with writing(folder) as new:
        (new / "a").write_text(text)
        (new / "deep").mkdir()
        (new / "deep" / "b").write_text(text)


def test_new_content_replaces_old_and_leaves_nothing_beside_it(tmp_path):
    folder = tmp_path / "made" / "x"
    fill(folder, "one")
    with writing(folder) as new:
        (new / "c").write_text("two")
        assert content(folder) == {"a": "one", "deep/b": "one"}, "the old content must stand until the end"
    assert content(folder) == {"c": "two"}
    assert [p.name for p in folder.parent.iterdir()] == ["x"]


def test_an_error_inside_leaves_the_old_content(tmp_path):
    folder = tmp_path / "x"
    with pytest.raises(RuntimeError, match="first"), writing(folder) as new:
        (new / "a").write_text("half")
        raise RuntimeError("first")
    assert list(tmp_path.iterdir()) == []
    fill(folder, "one")
    with pytest.raises(KeyboardInterrupt), writing(folder) as new:
        (new / "a").write_text("half")
        raise KeyboardInterrupt
    assert content(folder) == {"a": "one", "deep/b": "one"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_failing_rename_leaves_the_old_content(tmp_path, monkeypatch, rename):
    fill(tmp_path / "x", "one")
    real, calls = type(tmp_path).rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == rename:
            raise OSError("disk")
        return real(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OSError, match="disk"):
        fill(tmp_path / "x", "two")
    assert content(tmp_path / "x") == {"a": "one", "deep/b": "one"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("moment", ["writing", "first rename", "second rename"])
def test_a_kill_is_recovered_from(tmp_path, moment):
    folder = tmp_path / "x"
    fill(folder, "one")
    child = os.fork()
    if child == 0:
        kind, real = type(tmp_path), type(tmp_path).rename
        seen = []

        def killing(self, target):
            result = real(self, target)
            seen.append(target)
            if moment == ("first rename", "second rename")[len(seen) - 1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        kind.rename = killing
        with writing(folder) as new:
            (new / "a").write_text("two")
            if moment == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if moment == "first rename":
        assert not folder.exists()
    recover(folder)
    assert content(folder) == ({"a": "two"} if moment == "second rename" else {"a": "one", "deep/b": "one"})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "x") as new:
            (new / "a").touch(mode=0o600)
            (new / "deep").mkdir(mode=0o700)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "x").iterdir()}
        assert modes == {"a": 0o640, "deep": 0o750}
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
        assert os.umask(0o027) == 0o027, "the umask itself must stay as it was"
    finally:
        os.umask(before)


def test_folders_of_the_user_beside_it_stay(tmp_path):
    for name in ("x.old", "x.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    fill(tmp_path / "x", "one")
    fill(tmp_path / "x", "two")
    assert content(tmp_path / "x.old") == content(tmp_path / "x.new") == {"mine": "mine"}


def test_a_link_stays_a_link(tmp_path):
    fill(tmp_path / "target", "one")
    (tmp_path / "x").symlink_to(tmp_path / "target")
    fill(tmp_path / "x", "two")
    assert (tmp_path / "x").is_symlink()
    assert content(tmp_path / "target")["a"] == "two"
    assert not pending_folder(tmp_path / "x").exists()


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "é": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "mask.nii.gz"
    with replacing(path) as new:
        new.write_text("one")
        assert new.name.endswith(".nii.gz") and not path.exists()
    with pytest.raises(RuntimeError), replacing(path) as new:
        new.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["mask.nii.gz"]


def fill_slowly(folder, text, times):
    for _ in range(times):
        with writing(folder) as new:
            for name in "abc":
                (new / name).write_text(text)
                time.sleep(0.002)


def test_two_processes_write_one_folder_in_turn(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill_slowly, args=(tmp_path / "x", text, 25)) for text in "AB"]
    for writer in writers:
        writer.start()
    looks = []
    while any(writer.is_alive() for writer in writers):
        try:
            folder = os.open(tmp_path / "x", os.O_RDONLY)  # one folder, whatever takes its place meanwhile
        except FileNotFoundError:
            continue
        try:
            files = [os.open(name, os.O_RDONLY, dir_fd=folder) for name in "abc"]
        except FileNotFoundError:
            files = []
        finally:
            os.close(folder)
        looks.append({os.read(file, 9) for file in files})
        for file in files:
            os.close(file)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert max(map(len, looks)) == 1, "files of both writers stood in one folder"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_lock_is_refused_while_its_process_lives_and_free_when_it_was_killed(tmp_path):
    holds, ends = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(tmp_path / "x"):
            os.write(holds[1], b"y")
            os.read(ends[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.read(holds[0], 1)
    with (
        pytest.raises(BadInput, match=r"another process is writing .*x; wait until"),
        lock_folder(tmp_path / "x", wait_s=0),
    ):
        pass
    os.write(ends[1], b"y")
    os.waitpid(child, 0)
    with lock_folder(tmp_path / "x", wait_s=0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path):
    with replacing(tmp_path / "a.csv") as one, replacing(tmp_path / "a.csv") as two:
        one.write_text("one"), two.write_text("two")
    assert (tmp_path / "a.csv").read_text() == "one", "the last to end has the name"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
