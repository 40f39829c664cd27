"""CHECKS: all that is checked of an adapter before it is used, in order.

`load_adapter`, `inlay info --verify` and the bank run this one list, each with a host of its own: where the adapter is
to be used. A check that is added here is made by all of them.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from inlay.adapters import golden
from inlay.adapters.config import find_base_changing_init, refuse_biases
from inlay.adapters.file import AdapterFile, Reading, run_step
from inlay.adapters.identity import Identity, check_base
from inlay.adapters.method import check_method
from inlay.adapters.patterns import check_patterns
from inlay.adapters.weights import read_weights
from inlay.errors import DamagedFile, Unsupported

Result = Literal["ok", "not recorded", "left out"]


class Host(Protocol):
    """Where an adapter is to be used: on a base of its own (`load_adapter`), or on one of many (`Bank`).

    Attributes:
        shared: The base serves for more than this adapter, so nothing of it may be replaced.
        computes: The golden output is computed here; False where the user has asked for it to be left out.
    """

    shared: bool
    computes: bool

    def load_base(self, file: AdapterFile) -> str:
        """Make the base ready, and say its name."""

    def identify_base(self) -> Identity:
        """Which base it is."""

    def module_names(self) -> Iterable[str]:
        """Of the base without adapters."""

    def inject(self, file: AdapterFile, weights: dict[str, torch.Tensor]) -> None:
        """Put the adapter in its place, or raise InlayError where names or shapes are not those of its config."""

    def load_processor(self, file: AdapterFile) -> Any:
        """What makes the inputs; None where nothing says which."""

    def golden_output(self, file: AdapterFile, processor: Any) -> list[float]:
        """What the injected adapter makes of its golden input."""


@dataclass
class Candidate:
    """An adapter under examination: each check leaves here what later ones need.

    Attributes:
        reading: Its folder.
        host: Where it is to be used.
        results: By check, of those that are done.
        file: From the check of the record on.
        weights: From that of the weights on.
        base_name: From that of the base on.
        output: The golden output as it is found; None if none was computed.
        deviation: Relative difference to the golden output; None if there is none.
        tolerance: The largest that is allowed.
    """

    reading: Reading
    host: Host
    results: dict[str, Result] = field(default_factory=dict)
    file: AdapterFile = field(init=False, repr=False)
    weights: dict[str, torch.Tensor] = field(init=False, repr=False)
    base_name: str = ""
    output: list[float] | None = None
    deviation: float | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Check:
    """One of CHECKS.

    Attributes:
        name: As `inlay info --verify` prints it.
        needs: Names of the checks that must be done before.
        run: Raises InlayError for what does not fit; "not recorded" if the adapter does not say what it should be,
            "left out" if the user has asked for that.
        remark: What `inlay info --verify` says of it, once it is done.
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[Candidate], Result]
    remark: Callable[[Candidate], str]


def run_check(check: Check, candidate: Candidate) -> Result:
    """Run one check.

    Raises:
        InlayError: What it finds.
    """
    missing = set(check.needs) - candidate.results.keys()
    if missing:
        raise RuntimeError(f"the check {check.name!r} needs {', '.join(sorted(missing))} first")
    candidate.results[check.name] = result = check.run(candidate)
    return result


def run_checks(candidate: Candidate) -> None:
    """Run all CHECKS.

    Raises:
        InlayError: What the first one that fails finds.
    """
    for check in CHECKS:
        run_check(check, candidate)


def _check_files(candidate: Candidate) -> Result:
    run_step("files", candidate.reading)
    return "ok"


def _check_header(candidate: Candidate) -> Result:
    run_step("header", candidate.reading)
    return "ok" if "inlay" in candidate.reading.metadata else "not recorded"


def _remark_header(candidate: Candidate) -> str:
    seen = hashlib.sha256()
    with candidate.reading.weights.open("rb") as opened:
        while piece := opened.read(1 << 20):
            seen.update(piece)
    signed = candidate.results["header"] == "ok"
    checksum = "its own checksum is right" if signed else "no checksum in it to compare with"
    return f"sha256 {seen.hexdigest()}; {checksum}"


def _check_config(candidate: Candidate) -> Result:
    run_step("config", candidate.reading)
    return "ok"


def _check_record(candidate: Candidate) -> Result:
    run_step("record", candidate.reading)
    candidate.file = candidate.reading.file()
    return "ok" if candidate.file.record else "not recorded"


def _remark_record(candidate: Candidate) -> str:
    if not candidate.file.record:
        return "plain peft saved it, without its base's weights, its preprocessing and its output to compare with"
    return "its base, labels, preprocessing and output, and the config is the one that was saved with them"


def _check_method(candidate: Candidate) -> Result:
    file = candidate.file
    check_method(file)
    if init := find_base_changing_init(file.config):
        raise Unsupported(
            f"adapter {file.name!r} was initialised by {init!r}, which changes the base at each load; make it a plain "
            "one with peft's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    if candidate.host.shared:
        refuse_biases(file.config, file.name)
    return "ok"


def _check_weights(candidate: Candidate) -> Result:
    candidate.weights = read_weights(candidate.file)
    return "ok"


def _check_base(candidate: Candidate) -> Result:
    candidate.base_name = candidate.host.load_base(candidate.file)
    if not candidate.file.record:
        return "not recorded"
    check_base(candidate.file, candidate.host.identify_base())
    return "ok"


def _remark_base(candidate: Candidate) -> str:
    if candidate.results["base"] == "not recorded":
        return f"{candidate.base_name} may have other weights than the one it was trained on"
    return f"{candidate.base_name} has the structure and the weights that it was trained on"


def _check_patterns(candidate: Candidate) -> Result:
    check_patterns(candidate.file.config, candidate.host.module_names(), candidate.file.name)
    return "ok"


def _check_shapes(candidate: Candidate) -> Result:
    candidate.host.inject(candidate.file, candidate.weights)
    return "ok"


def _check_golden(candidate: Candidate) -> Result:
    """What computes nothing is refused even where no output is stored to compare with."""
    file, host = candidate.file, candidate.host
    if not host.computes:
        return "left out"
    stored, processor = file.record.get("golden"), host.load_processor(file)
    if processor is None:
        return "not recorded"
    try:
        found = candidate.output = host.golden_output(file, processor)
    except Exception as error:  # settings from anywhere let a model or a processor fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DamagedFile(f"adapter {file.name!r} loads, but fails on its first input: {reason}") from error
    if not stored:
        if not np.isfinite(found).all():
            raise DamagedFile(f"adapter {file.name!r} loads, but gives NaN or Inf; download it again, or another base.")
        return "not recorded"
    off = candidate.deviation = golden.measure_deviation(stored, found)
    base = host.identify_base()
    kernels = sum(len(shape) > 2 for shape in file.shapes.values())
    precisions = (base.precision, file.record["base"]["precision"])
    limit = candidate.tolerance = golden.allow_deviation(precisions, base.convolutions + kernels)
    if off > limit:
        raise DamagedFile(
            f"adapter {file.name!r} loads, but its output differs by {off:.2g} (relative) from the one stored with it, "
            f"{limit} allowed: its config or its base was changed since it was saved."
        )
    return "ok"


def _remark_golden(candidate: Candidate) -> str:
    if candidate.deviation is None:
        return "it fits its base, but no output was stored to compare with"
    precision = candidate.host.identify_base().precision
    return f"differs by {candidate.deviation:.1e} (relative), {candidate.tolerance:g} allowed on a base in {precision}"


CHECKS = (
    Check("files", (), _check_files, lambda c: "all there, and none of them larger than an adapter's"),
    Check("header", ("files",), _check_header, _remark_header),
    Check("config", ("header",), _check_config, lambda c: "asks for no more than its tensors hold, and for no code"),
    Check("record", ("config",), _check_record, _remark_record),
    Check("method", ("record",), _check_method, lambda c: f"{c.file.config['peft_type']}, which this peft knows"),
    Check("weights", ("record",), _check_weights, lambda c: f"finite in all of {len(c.weights)} tensors"),
    Check("base", ("record",), _check_base, _remark_base),
    Check(
        "patterns",
        ("base",),
        _check_patterns,
        lambda c: "done in time on the names of the modules",
    ),
    Check(
        "shapes",
        ("method", "weights", "base", "patterns"),
        _check_shapes,
        lambda c: f"{len(c.weights)} tensors, each of the name and shape that the config makes on this base",
    ),
    Check("golden", ("shapes",), _check_golden, _remark_golden),
)
