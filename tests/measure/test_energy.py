"""Counters that are there, wrap, stand still or may not be read, and what is said where there is none."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from inlay.errors import InlayError
from inlay.measure import energy as meter
from inlay.measure import measure_energy

INPUTS = {"x": torch.zeros(1, 2)}
FILES = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1",
    "intel-rapl:2": "psys",
    "intel-rapl-mmio:0": "package-0",
}
WATTS = {"package-0": 50.0, "package-1": 50.0, "dram": 5.0, "core": 30.0, "psys": 120.0}


class Machine(nn.Module):
    """A model whose pass takes 10 ms and 20 ms of CPU, on a machine with a clock and counters of its own.

    A package takes 50 W, its memory 5 W; every look at the clock takes 0.1 ms, every counter moves once a millisecond.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.now, self.cpu, self.moves = 0.0, 0.0, True
        self.folder, self.range_uj, self.begun_uj = folder, 262_143_328_850, 123_456

    def fill(self) -> "Machine":
        for zone, name in FILES.items():
            (self.folder / zone).mkdir()
            (self.folder / zone / "name").write_text(f"{name}\n")
            (self.folder / zone / "max_energy_range_uj").write_text(f"{self.range_uj}\n")
        (self.folder / "intel-rapl").mkdir()  # the kind of control, which counts nothing
        self.spend(0)
        return self

    def millijoules(self) -> int:
        return round(50 * math.floor(self.now * 1e3)) if self.moves else 0

    def spend(self, seconds: float) -> float:
        self.now += seconds
        for zone, name in FILES.items():
            if (self.folder / zone).is_dir() and self.moves:
                joules = WATTS[name] * math.floor(self.now * 1e3) / 1e3
                (self.folder / zone / "energy_uj").write_text(
                    f"{(self.begun_uj + round(joules * 1e6)) % self.range_uj}\n"
                )
        return self.now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.spend(0.01)
        self.cpu += 0.02
        return x


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One without counters; `fill` gives it some."""
    made = Machine(tmp_path)
    monkeypatch.setattr(meter, "POWERCAP", tmp_path)
    clock = SimpleNamespace(perf_counter=lambda: made.spend(1e-4), process_time=lambda: made.cpu)
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.delenv(meter.WATTS, raising=False)
    return made


@pytest.mark.parametrize("wraps", [False, True])
def test_rapl_counts_packages_and_memory_once_also_when_it_wraps(machine, wraps):
    """25 J of each package are measured, and the counter is 10 J before its end where it wraps."""
    machine.begun_uj += (machine.range_uj - 10_000_000) * wraps
    used = measure_energy(machine.fill(), INPUTS)
    assert used.kind == "measured" and used.source.startswith("RAPL, package-0 + dram + package-1")
    assert used.joules == pytest.approx((50 + 5 + 50) * 0.0101, rel=0.02)
    assert 45 <= used.passes <= 50  # half a second


def test_a_slow_counter_is_waited_for(machine, monkeypatch):
    monkeypatch.setattr(meter, "_UPDATES", 2000)
    assert measure_energy(machine.fill(), INPUTS).passes >= 190  # 2,000 updates of a millisecond


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("energy_uj", "", "RAPL gives '' for energy_uj"),
        ("energy_uj", "no number", "RAPL gives 'no number' for energy_uj"),
        ("max_energy_range_uj", "0", "RAPL gives no range for package-1"),
        ("name", "platform", "RAPL, package-0"),
    ],
)
def test_rapl_that_says_nonsense(machine, monkeypatch, file, text, said):
    machine.fill()
    (machine.folder / "intel-rapl:1" / file).write_text(text)
    machine.moves = False
    used = measure_energy(machine, INPUTS)
    assert (used.joules, used.kind, used.passes) == (None, "unavailable", 0)
    assert said in used.source and "no watts per core are declared (INLAY_WATTS_PER_CORE)" in used.source


def test_rapl_that_stands_still_or_stops(machine):
    machine.fill().moves = False
    assert "it stands still; no watts" in measure_energy(machine, INPUTS).source
    counter = meter._open_rapl()
    readings = iter([0.0, 1.0, 1.0, 2.0])
    stops = counter._replace(joules=lambda: next(readings, 2.0))
    with pytest.raises(meter._CounterUnavailable, match="it stood still during"):
        meter._measure_by_counter(stops, lambda: machine.spend(0.01))


def test_rapl_that_only_root_may_read(machine, monkeypatch):
    machine.fill()
    read = Path.read_text

    def refuse(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    used = measure_energy(machine, INPUTS)
    assert used.joules is None and "by root only: sudo chmod a+r" in str(used) and str(used).startswith("unavailable: ")
    declared = measure_energy(machine, INPUTS, watts_per_core=5)
    assert (declared.kind, declared.joules) == ("estimated", pytest.approx(0.02 * 5))


def test_watts_are_declared_or_nothing_is_said(machine, monkeypatch):
    used = measure_energy(machine, INPUTS)
    assert str(used).startswith("unavailable: this machine has no RAPL counter; no watts per core are declared")
    monkeypatch.setenv(meter.WATTS, "7.5")
    used = measure_energy(machine, INPUTS)
    assert (used.kind, used.joules) == ("estimated", pytest.approx(0.02 * 7.5)) and "x 7.5 W per core" in used.source
    assert measure_energy(machine, INPUTS, watts_per_core=2).joules == pytest.approx(0.04)
    for wrong in ("many", "0", "-3", "nan", "inf"):
        monkeypatch.setenv(meter.WATTS, wrong)
        used = measure_energy(machine, INPUTS)
        assert used.joules is None and f"INLAY_WATTS_PER_CORE is '{wrong}', not a number of watts" in used.source


def test_errors(machine):
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(InlayError, match="watts_per_core must be a number above 0"):
            measure_energy(machine, INPUTS, watts_per_core=wrong)
    with pytest.raises(InlayError, match="there are no inputs"):
        measure_energy(machine, {})


class Refused(Exception):
    """NVML's."""


@pytest.fixture
def nvml(machine, monkeypatch):
    """A module pynvml with one board, which is not the first one, and a model on it."""
    module = ModuleType("pynvml")
    asked: list[str] = []
    module.NVMLError = Refused
    module.nvmlInit = lambda: asked.append("init")
    module.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "board"
    module.nvmlDeviceGetName = lambda board: f"Test {board}"
    module.nvmlDeviceGetTotalEnergyConsumption = lambda board: machine.millijoules()
    module.asked = asked
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"1-2-{device.index}"))
    monkeypatch.setattr(meter, "device_of", lambda model: torch.device("cuda", 3))
    return module


def test_nvml_counts_the_board_that_the_model_is_on(machine, nvml):
    used = measure_energy(machine, INPUTS)
    assert nvml.asked == ["init", "GPU-1-2-3"]
    assert str(used) == "measured: NVML, the board Test board with its idle power"
    assert used.joules == pytest.approx(50 * 0.0101, rel=0.02)


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_nvml_that_refuses_is_not_replaced_by_the_energy_of_the_cpu(machine, nvml, monkeypatch, function):
    def refuse(*_):
        raise Refused("Not Supported")

    monkeypatch.setattr(nvml, function, refuse)
    machine.fill()
    assert str(measure_energy(machine, INPUTS, watts_per_core=5)) == "unavailable: NVML: Not Supported"


def test_without_nvml_and_on_other_devices(machine, nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert str(measure_energy(machine, INPUTS)) == "unavailable: NVML cannot be read: pip install nvidia-ml-py"
    monkeypatch.setattr(meter, "device_of", lambda model: torch.device("mps"))
    assert str(measure_energy(machine, INPUTS)) == "unavailable: no counter of mps devices is known"
