"""Everything that can be checked of an adapter, one line each: for `inlay info --verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay.adapters.checks import CHECKS, Candidate, Result, run_check
from inlay.adapters.file import AdapterFile, Reading, read_adapter
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.load import OwnBase
from inlay.bases.device import Device
from inlay.errors import InlayError


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: Was checked: a name of CHECKS, or what metrics.json tells.
        result: ok, failed, not recorded (the adapter does not say what it should be), or left out as was asked.
        remark: The figure, or the reason.
    """

    what: str
    result: Literal["failed"] | Result
    remark: str


def verify(path: str | Path, base: str | None = None, *, device: Device | None = None) -> list[Finding]:
    """Check a folder or Hub id as loading does, on the base that it names or on `base`, and say each result.

    Once a check has failed the later ones are left out.

    Raises:
        InlayError: There is no such folder or Hub id.
    """
    folder = fetch(path)
    if not folder.is_dir():
        read_adapter(folder)
    candidate, found = Candidate(Reading(folder), OwnBase(base, device=device)), []
    for check in CHECKS:
        try:
            result = run_check(check, candidate)
        except InlayError as error:
            found.append(Finding(check.name, "failed", str(error)))
            break
        found.append(Finding(check.name, result, check.remark(candidate)))
    return found + (_origin(candidate.file) if "record" in candidate.results else [])


def _origin(file: AdapterFile) -> list[Finding]:
    """What metrics.json tells, which no checksum covers: by whom, on what, with which versions."""
    training, versions = (file.metrics.get(key) for key in ("training", "versions"))
    training = training if isinstance(training, dict) else {}
    settings = {key: training[key] for key in ("dataset", "epochs", "steps", "seed") if key in training}
    told = {
        "trained by": str(file.metrics.get("trained_by") or ""),
        "trained on": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "trained with": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
    }
    return [Finding(what, "ok" if text else "not recorded", text) for what, text in told.items()]
