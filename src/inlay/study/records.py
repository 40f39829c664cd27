"""The finished trials of a study, in one file: a JSON object a line, each whole or ignored."""

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inlay.errors import BadInput, DamagedFile
from inlay.study.trial import Outcome, Trial

FILE = "trials.jsonl"


class Records:
    """The finished trials of a study, read once and appended to by one process.

        {"settings": {...}}                             what all trials share, the first line
        {"outcome": {...}, "measured": ["test", ...]}   a finished trial, and what was asked of it
        {"seconds_per_step": {...}}                     by method and width, where the budget is in seconds
        {"latency_ms": {...}}                           with and without an adapter, where it is limited
        {"steps_of_search": {...}}                      for which a search has time, where its budget is in seconds

    A later line about a trial replaces an earlier one. A last line without its end, which a killed process leaves, is
    ignored and overwritten. Nothing is written over the lines of another process.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any] | None = None) -> None:
        """Read what is there.

        Args:
            path: Of the file, which need not exist.
            settings: What decides the outcome of a trial besides the trial; None: read those of the file.

        Raises:
            BadInput: The file is of a study with other settings.
            DamagedFile: A line that is none of these kinds.
        """
        self.path = Path(path)
        self.settings: dict[str, Any] = {}
        self.seconds_per_step: dict[str, float] = {}
        self.latency_ms: dict[str, list[float]] = {}
        self.steps_of_search: dict[str, int] = {}
        self._outcomes: dict[Trial, Outcome] = {}
        self._measured: dict[Trial, frozenset[str]] = {}
        self._end = 0  # bytes of all whole lines
        self._read()
        if settings is not None:
            self._agree_on(json.loads(json.dumps(settings)))

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all finished trials, in the order in which they were finished first."""
        return list(self._outcomes.values())

    def find(self, trial: Trial) -> Outcome | None:
        """The outcome of a finished trial; a trial that failed is finished too."""
        return self._outcomes.get(trial)

    def read(self, trial: Trial) -> Outcome:
        """The outcome of a trial that is finished."""
        return self._outcomes[trial]

    def list_measured(self, trial: Trial) -> frozenset[str]:
        """What was asked of a finished trial: test, costs, forgetting."""
        return self._measured.get(trial, frozenset())

    def add(self, outcome: Outcome, measured: Collection[str] = ()) -> None:
        """Append a finished trial; it is on the disk when this returns."""
        self._append({"outcome": asdict(outcome), "measured": sorted(measured)})
        self._keep(outcome, measured)

    def add_seconds_per_step(self, name: str, seconds: float) -> None:
        """Append how long a step takes, which decides the number of steps where the budget is in seconds."""
        self._append({"seconds_per_step": {name: seconds}})
        self.seconds_per_step[name] = seconds

    def add_latency(self, name: str, latency_ms: list[float]) -> None:
        """Append how long an input takes with an adapter and without it."""
        self._append({"latency_ms": {name: latency_ms}})
        self.latency_ms[name] = latency_ms

    def add_steps_of_search(self, name: str, steps: int) -> None:
        """Append how many steps a search may take."""
        self._append({"steps_of_search": {name: steps}})
        self.steps_of_search[name] = steps

    def _keep(self, outcome: Outcome, measured: Collection[str]) -> None:
        self._outcomes[outcome.trial] = outcome
        self._measured[outcome.trial] = frozenset(measured)

    def _read(self) -> None:
        if not self.path.is_file():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DamagedFile(
                    f"line {number} of {self.path} is no trial ({error}); delete that line, or the file."
                ) from None
            self._end += len(line)

    def _take(self, row: dict[str, Any]) -> None:
        if "settings" in row:
            self.settings = dict(row["settings"])
        elif "seconds_per_step" in row:
            self.seconds_per_step |= row["seconds_per_step"]
        elif "latency_ms" in row:
            self.latency_ms |= row["latency_ms"]
        elif "steps_of_search" in row:
            self.steps_of_search |= row["steps_of_search"]
        else:
            trial = dict(row["outcome"].pop("trial"))
            blocks = trial["blocks"]
            trial["blocks"] = None if blocks is None else tuple(blocks)
            self._keep(Outcome(Trial(**trial), **row["outcome"]), row["measured"])

    def _agree_on(self, settings: dict[str, Any]) -> None:
        """Write the settings into a new file, or compare them with those of the file."""
        if not self._end:
            self._append({"settings": settings})
            self.settings = settings
        differing = [k for k in sorted({*settings, *self.settings}) if settings.get(k) != self.settings.get(k)]
        if differing:
            changes = ", ".join(f"{k} {self.settings.get(k)!r} -> {settings.get(k)!r}" for k in differing)
            raise BadInput(
                f"{self.path.parent} holds a study with other settings ({changes}); choose another folder, or delete "
                "that one."
            )

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(self._end)
            if b"\n" in file.read():
                raise BadInput(
                    f"another process is writing {self.path.parent}; let it end, and start this one again, or choose "
                    "another folder."
                )
            file.truncate(self._end)  # without the rest of a line that was not finished
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
