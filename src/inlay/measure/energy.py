"""What energy a forward pass takes: by a counter of the machine, or by watts that the user declares, else unknown."""

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
from inlay.measure.speed import device_of, passes

WATTS = "INLAY_WATTS_PER_CORE"
POWERCAP = Path("/sys/class/powercap")
_UPDATES = 20  # of a counter that a measurement spans: what is cut off at its end is a twentieth of it at most
_WINDOW_S = 0.5  # it lasts so long at least
_STILL_S = 1.0  # a counter that has stood still for so long does not count


@dataclass(frozen=True)
class Energy:
    """Energy of one forward pass over a batch.

    Attributes:
        joules: None where it is unavailable.
        kind: `measured` by a counter, `estimated` from declared watts, or `unavailable`.
        source: The counter and what it covers, the terms of the estimate, or why there is neither.
        passes: How many it is the mean of.
    """

    joules: float | None
    kind: Literal["measured", "estimated", "unavailable"]
    source: str
    passes: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.source}"


class _Counter(NamedTuple):
    """Joules since some moment, which never become fewer, and what they cover."""

    source: str
    joules: Callable[[], float]


class _Unavailable(Exception):
    """Why a counter cannot be used."""


def measure_energy(
    model: nn.Module, inputs: dict[str, Tensor], *, watts_per_core: float | None = None, warmup: int = 1
) -> Energy:
    """Energy of single forward passes in eval and inference mode, their mean over half a second or more.

    On CUDA NVML counts the energy of the board (nvidia-ml-py; Volta and later), not that of the host. On a CPU RAPL
    counts that of all packages and of the memory where it has a zone for it (Linux; opened by root). Both include what
    the device takes when idle and what other processes do on it; 20 updates of the counter are waited for, so that
    less than 5 % is cut off. Where a CPU has no counter, and only if watts are declared, it is this process's CPU
    seconds times watts.

    Args:
        model: Any module, all on one device.
        inputs: Keyword arguments of its forward.
        watts_per_core: What a busy core takes; default: INLAY_WATTS_PER_CORE, else it is not declared.
        warmup: Passes before those that count.

    Raises:
        InlayError: There are no inputs; watts_per_core is not a positive number.
    """
    if watts_per_core is not None and not _positive(watts_per_core):
        raise BadInput(f"expected watts_per_core above 0, got {watts_per_core!r}; leave it out if it is not known.")
    device = device_of(model)
    with passes(model, inputs) as run:
        try:
            counter = _counter(device)
            _warm(run, warmup)
            return _count(counter, run)
        except _Unavailable as error:
            reason = str(error)
        if device.type == "cpu":
            watts, remark = (watts_per_core, "") if watts_per_core is not None else _declared()
            if watts is not None:
                _warm(run, warmup)
                return _estimate(watts, run)
            reason = f"{reason}; {remark}"
    return Energy(None, "unavailable", reason, 0)


def _warm(run: Callable[[], float], times: int) -> None:
    for _ in range(times):
        run()


def _counter(device: torch.device) -> _Counter:
    if device.type == "cuda":
        return _nvml(device)
    if device.type == "cpu":
        return _rapl()
    raise _Unavailable(f"no counter of {device.type} devices is known")


def _nvml(device: torch.device) -> _Counter:
    try:
        import pynvml
    except ImportError:
        raise _Unavailable("NVML cannot be asked: pip install nvidia-ml-py") from None

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            raise _Unavailable(f"NVML: {error}") from None

    ask(pynvml.nvmlInit)
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # CUDA_VISIBLE_DEVICES renumbers, NVML does not
    board = ask(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid.removeprefix('GPU-')}")
    name = ask(pynvml.nvmlDeviceGetName, board)
    return _Counter(
        f"NVML, the board {name} with its idle power",
        lambda: ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, board) / 1e3,
    )


def _rapl() -> _Counter:
    """All packages and their memory; `core` and `uncore` are parts of a package, and `psys` holds it again."""
    zones = [_Zone(path) for path in sorted(POWERCAP.glob("intel-rapl:*")) if _counts(path)]
    if not any(zone.name.startswith("package") for zone in zones):
        raise _Unavailable("the machine shows no RAPL counter")
    names = " + ".join(zone.name for zone in zones)
    return _Counter(f"RAPL, {names} with idle power and other processes", lambda: sum(zone.joules() for zone in zones))


def _counts(zone: Path) -> bool:
    name = _read(zone / "name")
    return name.startswith("package") or name == "dram"


class _Zone:
    """A counter of the kernel in microjoules; it begins anew at max_energy_range_uj, which takes minutes."""

    def __init__(self, path: Path) -> None:
        self.name = _read(path / "name")
        self._file, self._range = path / "energy_uj", _number(path / "max_energy_range_uj")
        self._last, self._total = _number(self._file), 0
        if self._range <= 0:
            raise _Unavailable(f"RAPL says no range for {self.name}")

    def joules(self) -> float:
        now = _number(self._file)
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total / 1e6


def _number(path: Path) -> int:
    text = _read(path)
    if not text.isdecimal():
        raise _Unavailable(f"RAPL says {text[:20]!r} for {path.name}")
    return int(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except PermissionError:
        raise _Unavailable("RAPL may be read by root alone: sudo chmod a+r /sys/class/powercap/*/energy_uj") from None
    except OSError as error:
        raise _Unavailable(f"RAPL cannot be read ({error.strerror})") from None


def _count(counter: _Counter, run: Callable[[], float]) -> Energy:
    """Passes from one update of the counter until there have been enough of them."""
    before, _ = _update(counter)
    start, first = _update(counter)
    window = max(_WINDOW_S, _UPDATES * (start - before))
    count = 0
    while count == 0 or time.perf_counter() - start < window:
        run()
        count += 1
    joules = (counter.joules() - first) / count
    if joules <= 0:
        raise _Unavailable(f"{counter.source}: it stood still during {count} passes")
    return Energy(joules, "measured", counter.source, count)


def _update(counter: _Counter) -> tuple[float, float]:
    """The moment after the counter's next update, and its joules then."""
    before, deadline = counter.joules(), time.perf_counter() + _STILL_S
    while (now := counter.joules()) == before:
        if time.perf_counter() > deadline:
            raise _Unavailable(f"{counter.source}: it stands still")
    return time.perf_counter(), now


def _declared() -> tuple[float | None, str]:
    """Watts of a core by the environment, and if there are none why: a wrong variable must not end a training."""
    text = os.environ.get(WATTS, "").strip()
    if not text:
        return None, f"no watts per core are declared ({WATTS})"
    try:
        watts = float(text)
    except ValueError:
        watts = math.nan
    return (watts, "") if _positive(watts) else (None, f"{WATTS} is {text[:20]!r}, not a number of watts above 0")


def _positive(watts: float) -> bool:
    return math.isfinite(watts) and watts > 0


def _estimate(watts: float, run: Callable[[], float]) -> Energy:
    begun, spent, count = time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begun < _WINDOW_S:
        run()
        count += 1
    joules = (time.process_time() - spent) * watts / count
    source = f"this process's CPU seconds x {watts:g} W per core, as declared by the user"
    return Energy(joules, "estimated", source, count)
