"""Energy of a forward pass: measured by a counter of the machine, or estimated from watts that the user declares."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from inlay.errors import BadInput
from inlay.measure.speed import device_of, forward_passes

WATTS = "INLAY_WATTS_PER_CORE"
POWERCAP = Path("/sys/class/powercap")
_UPDATES = 20  # counter updates that a measurement spans, so that at most a twentieth is cut off at its end
_WINDOW_S = 0.5  # shortest measurement
_STILL_S = 1.0  # a counter without an update for this long is not used


@dataclass(frozen=True)
class Energy:
    """Energy of one forward pass over a batch.

    Attributes:
        joules: None if unavailable.
        kind: `measured` by a counter, `estimated` from declared watts, or `unavailable`.
        source: The counter and what it covers, the terms of the estimate, or the reason why there is neither.
        passes: Number of passes over which the mean is taken.
    """

    joules: float | None
    kind: Literal["measured", "estimated", "unavailable"]
    source: str
    passes: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.source}"


class _EnergyCounter(NamedTuple):
    """A counter of joules that never decreases, and a description of what it covers."""

    source: str
    joules: Callable[[], float]


class _CounterUnavailable(Exception):
    """A counter cannot be used; the message gives the reason."""


def measure_energy(
    model: nn.Module, inputs: dict[str, Tensor], *, watts_per_core: float | None = None, warmup: int = 1
) -> Energy:
    """Mean energy of single forward passes in eval and inference mode, over half a second or more.

    On CUDA, NVML counts the energy of the board (nvidia-ml-py; Volta and later), not of the host. On a CPU, RAPL counts
    the energy of all packages, and of the memory if it has a zone for it (Linux; only root may read it by default).
    Both include idle power and the work of other processes. A measurement spans 20 updates of the counter, so that less
    than 5 % is cut off. If a CPU has no counter and watts are declared, the energy is estimated as the CPU seconds of
    this process times the watts.

    Args:
        model: Any module, on one device.
        inputs: Keyword arguments of its forward.
        watts_per_core: Watts of a busy core; default: the variable INLAY_WATTS_PER_CORE, else not declared.
        warmup: Passes before the measurement.

    Raises:
        InlayError: There are no inputs, or watts_per_core is not a positive number.
    """
    if watts_per_core is not None and not _is_positive(watts_per_core):
        raise BadInput(
            f"watts_per_core must be a number above 0, got {watts_per_core!r}; leave it out if it is not known."
        )
    device = device_of(model)
    with forward_passes(model, inputs) as run:
        try:
            counter = _open_counter(device)
            _warm_up(run, warmup)
            return _measure_by_counter(counter, run)
        except _CounterUnavailable as error:
            reason = str(error)
        if device.type == "cpu":
            watts, remark = (watts_per_core, "") if watts_per_core is not None else _read_declared_watts()
            if watts is not None:
                _warm_up(run, warmup)
                return _estimate_by_watts(watts, run)
            reason = f"{reason}; {remark}"
    return Energy(None, "unavailable", reason, 0)


def _warm_up(run: Callable[[], float], times: int) -> None:
    for _ in range(times):
        run()


def _open_counter(device: torch.device) -> _EnergyCounter:
    if device.type == "cuda":
        return _open_nvml(device)
    if device.type == "cpu":
        return _open_rapl()
    raise _CounterUnavailable(f"no counter of {device.type} devices is known")


def _open_nvml(device: torch.device) -> _EnergyCounter:
    try:
        import pynvml
    except ImportError:
        raise _CounterUnavailable("NVML cannot be read: pip install nvidia-ml-py") from None

    def call_nvml(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            raise _CounterUnavailable(f"NVML: {error}") from None

    call_nvml(pynvml.nvmlInit)
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # CUDA_VISIBLE_DEVICES renumbers devices, NVML does not
    board = call_nvml(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid.removeprefix('GPU-')}")
    name = call_nvml(pynvml.nvmlDeviceGetName, board)
    return _EnergyCounter(
        f"NVML, the board {name} with its idle power",
        lambda: call_nvml(pynvml.nvmlDeviceGetTotalEnergyConsumption, board) / 1e3,
    )


def _open_rapl() -> _EnergyCounter:
    """A counter over all packages and their memory. `core` and `uncore` are parts of a package; `psys` contains it."""
    zones = [_RaplZone(path) for path in sorted(POWERCAP.glob("intel-rapl:*")) if _is_counted(path)]
    if not any(zone.name.startswith("package") for zone in zones):
        raise _CounterUnavailable("this machine has no RAPL counter")
    names = " + ".join(zone.name for zone in zones)
    return _EnergyCounter(
        f"RAPL, {names} with idle power and other processes", lambda: sum(zone.joules() for zone in zones)
    )


def _is_counted(zone: Path) -> bool:
    name = _read_text(zone / "name")
    return name.startswith("package") or name == "dram"


class _RaplZone:
    """A kernel counter in microjoules. It wraps around at max_energy_range_uj, after minutes."""

    def __init__(self, path: Path) -> None:
        self.name = _read_text(path / "name")
        self._file, self._range = path / "energy_uj", _read_number(path / "max_energy_range_uj")
        self._last, self._total = _read_number(self._file), 0
        if self._range <= 0:
            raise _CounterUnavailable(f"RAPL gives no range for {self.name}")

    def joules(self) -> float:
        now = _read_number(self._file)
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total / 1e6


def _read_number(path: Path) -> int:
    text = _read_text(path)
    if not text.isdecimal():
        raise _CounterUnavailable(f"RAPL gives {text[:20]!r} for {path.name}")
    return int(text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except PermissionError:
        raise _CounterUnavailable(
            "RAPL can be read by root only: sudo chmod a+r /sys/class/powercap/*/energy_uj"
        ) from None
    except OSError as error:
        raise _CounterUnavailable(f"RAPL cannot be read ({error.strerror})") from None


def _measure_by_counter(counter: _EnergyCounter, run: Callable[[], float]) -> Energy:
    """Run passes from one update of the counter until the measurement is long enough."""
    before, _ = _wait_for_update(counter)
    start, first = _wait_for_update(counter)
    window = max(_WINDOW_S, _UPDATES * (start - before))
    count = 0
    while count == 0 or time.perf_counter() - start < window:
        run()
        count += 1
    joules = (counter.joules() - first) / count
    if joules <= 0:
        raise _CounterUnavailable(f"{counter.source}: it stood still during {count} passes")
    return Energy(joules, "measured", counter.source, count)


def _wait_for_update(counter: _EnergyCounter) -> tuple[float, float]:
    """Wait for the next update of the counter. Returns the time after it, and its joules."""
    before, deadline = counter.joules(), time.perf_counter() + _STILL_S
    while (now := counter.joules()) == before:
        if time.perf_counter() > deadline:
            raise _CounterUnavailable(f"{counter.source}: it stands still")
    return time.perf_counter(), now


def _read_declared_watts() -> tuple[float | None, str]:
    """Watts per core from the environment, or the reason why there are none: a wrong value must not end a training."""
    text = os.environ.get(WATTS, "").strip()
    if not text:
        return None, f"no watts per core are declared ({WATTS})"
    try:
        watts = float(text)
    except ValueError:
        watts = math.nan
    return (watts, "") if _is_positive(watts) else (None, f"{WATTS} is {text[:20]!r}, not a number of watts above 0")


def _is_positive(watts: float) -> bool:
    return math.isfinite(watts) and watts > 0


def _estimate_by_watts(watts: float, run: Callable[[], float]) -> Energy:
    begun, spent, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begun < _WINDOW_S:
        run()
        count += 1
    joules = (time.process_time() - spent) * watts / count
    source = f"this process's CPU seconds x {watts:g} W per core, as declared by the user"
    return Energy(joules, "estimated", source, count)
