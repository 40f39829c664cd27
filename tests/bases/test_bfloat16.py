"""Whether bfloat16 pays: timed once, kept in a file, and timed again where the file is of something else."""

import json

import pytest
import torch

from inlay.bases import bfloat16, cpu


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The file that is kept, and a count of the timings, each of which finds one more."""
    counted = []
    monkeypatch.setattr(bfloat16, "speedup_file", lambda: tmp_path / "inlay" / "bfloat16.json")
    monkeypatch.setattr(bfloat16, "time_bfloat16", lambda device: counted.append(device) or 2.0 + len(counted))
    return tmp_path / "inlay" / "bfloat16.json", counted


def test_a_cpu_is_timed_once(timed):
    file, counted = timed
    assert [bfloat16.find_cpu_speedup() for _ in range(3)] == [3.0, 3.0, 3.0] and len(counted) == 1
    assert json.loads(file.read_text())["torch"] == torch.__version__
    assert bfloat16.find_cpu_speedup(fresh=True) == 4.0 == bfloat16.find_cpu_speedup()


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another"},
        {"torch": "1.0"},
        {"capability": "another"},
        {"speedup": -1},
        {"speedup": "fast"},
        {"more": 1},
    ],
)
def test_what_is_kept_of_something_else_is_timed_again(timed, change):
    file, counted = timed
    bfloat16.find_cpu_speedup()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert bfloat16.find_cpu_speedup() == 4.0 and len(counted) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "\x00"])
def test_a_damaged_file_is_timed_again(timed, content):
    file, _ = timed
    file.parent.mkdir()
    file.write_text(content)
    assert bfloat16.find_cpu_speedup() == 3.0 == bfloat16.find_cpu_speedup()


def test_where_nothing_can_be_written_it_is_timed_each_time(timed):
    file, _ = timed
    file.parent.write_text("a file in the place of the folder")
    assert [bfloat16.find_cpu_speedup() for _ in range(2)] == [3.0, 4.0]


def test_a_real_timing_is_a_ratio_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    assert 0.001 < bfloat16.time_bfloat16(torch.device("cpu")) < 100
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("speedup", "dtype"), [(4.0, "bfloat16"), (1.5, "bfloat16"), (1.1, "float32"), (0.05, "float32")]
)
def test_a_cpu_takes_it_where_it_pays(monkeypatch, speedup, dtype):
    monkeypatch.setattr(bfloat16, "find_cpu_speedup", lambda: speedup)
    found, why = bfloat16.choose_dtype(torch.device("cpu"))
    assert found == dtype and f"{speedup:.2g} times" in why


def test_a_gpu_takes_it_where_it_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert bfloat16.choose_dtype(torch.device("cuda"))[0] == "float32"  # a GPU that would emulate it
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert bfloat16.choose_dtype(torch.device("cuda:1"))[0] == "bfloat16"
    assert bfloat16.choose_dtype(torch.device("mps"))[0] == "float32"


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (
            "processor\t: 0\nmodel name\t: A CPU @ 2: GHz\nflags\t\t: fpu avx512_bf16\n",
            "A CPU @ 2: GHz",
            ["avx512_bf16"],
        ),
        ("processor\t: 0\nFeatures\t: fp bf16 svebf16\n", None, ["svebf16", "bf16"]),
        (None, None, []),
    ],
)
def test_the_cpu_is_read_from_what_linux_says(monkeypatch, tmp_path, text, name, flags):
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert bfloat16.list_bfloat16_instructions() == flags
    assert cpu.name_cpu() == name if name else cpu.name_cpu()
