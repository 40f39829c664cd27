"""Everything that can be checked of an adapter, one line each: for `inlay info --verify`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.adapters.file import WEIGHTS, AdapterFile, read_adapter
from inlay.adapters.hub.fetch import fetch
from inlay.errors import InlayError

Result = Literal["ok", "failed", "not recorded"]


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        what: Was checked.
        result: ok, failed, or not recorded: the adapter does not say what it should be.
        remark: The figure, or the reason.
    """

    what: str
    result: Result
    remark: str


def verify(path: str | Path, base: str | None = None) -> list[Check]:
    """Check a folder or Hub id as loading does, on the base that it names or on `base`, and say each result.

    Once a check has failed those that build on it are left out.

    Raises:
        InlayError: There is no such folder or Hub id.
    """
    folder = fetch(path)
    if not folder.is_dir():
        read_adapter(folder)
    look, checks = _Look(folder, base), []
    steps = {
        "files": look.read,
        "hash": look.hash,
        "method": look.know,
        "finite weights": look.weigh,
        "base": look.compare,
        "golden output": look.use,
    }
    for what, step in steps.items():
        try:
            checks.append(Check(what, *step()))
        except InlayError as error:
            checks.append(Check(what, "failed", str(error)))
            break
    return checks + ([] if look.file is None else _origin(look.file))


class _Look:
    """The steps of loading, one by one, with what each leaves to the next."""

    def __init__(self, folder: Path, base: str | None) -> None:
        self.folder, self.base = folder, base
        self.file: Any = None
        self.weights: Any = None
        self.model: Any = None

    def read(self) -> tuple[Result, str]:
        self.file = read_adapter(self.folder)
        return "ok", "whole, and nothing in them asks for more than they hold"

    def hash(self) -> tuple[Result, str]:
        seen = hashlib.sha256()
        with (self.folder / WEIGHTS).open("rb") as opened:
            while piece := opened.read(1 << 20):
                seen.update(piece)
        told = "its own checksum is right" if self.file.record else "no checksum in it to compare with"
        return ("ok" if self.file.record else "not recorded"), f"sha256 {seen.hexdigest()}; {told}"

    def know(self) -> tuple[Result, str]:
        from inlay.adapters.method import check_method

        check_method(self.file)
        return "ok", f"{self.file.config['peft_type']}, which this peft knows"

    def weigh(self) -> tuple[Result, str]:
        from inlay.adapters.load import read_weights

        self.weights = read_weights(self.file)
        return "ok", f"in all of {len(self.weights)} tensors"

    def compare(self) -> tuple[Result, str]:
        from inlay.adapters.identity import check_base, identity
        from inlay.adapters.load import load_own_base

        self.model = load_own_base(self.file, self.base)
        name = self.model.name_or_path
        if not self.file.record:
            return "not recorded", f"{name} may have other weights than the one it was trained on"
        check_base(self.file, identity(self.model))
        return "ok", f"{name} has the structure and the weights that it was trained on"

    def use(self) -> tuple[Result, str]:
        from inlay.adapters import golden
        from inlay.adapters.load import mount

        off = mount(self.file, self.weights, self.model).deviation
        if off is None:
            return "not recorded", "it fits its base, but no output was stored to compare with"
        return "ok", f"differs by {off:.1e} (relative), {golden.TOLERANCE['float32']:g} allowed on a base in float32"


def _origin(file: AdapterFile) -> list[Check]:
    """What metrics.json tells, which no checksum covers: by whom, on what, with which versions."""
    training, versions = (file.metrics.get(key) for key in ("training", "versions"))
    training = training if isinstance(training, dict) else {}
    settings = {key: training[key] for key in ("dataset", "epochs", "steps", "seed") if key in training}
    told = {
        "trained by": str(file.metrics.get("trained_by") or ""),
        "trained on": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "trained with": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
    }
    return [Check(what, "ok" if text else "not recorded", text) for what, text in told.items()]
