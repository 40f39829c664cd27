"""A folder of adapters that is watched: what is put there is served, what is taken away is not.

The folder is looked at every second, which every file system supports and a thousand adapters allow. A change counts
once two looks have found the same, so that a folder which is being copied is left alone; to move a finished one there
is better. One that stays wrong is refused with its sentence, until its files change again.
"""

import logging
import os
import threading
import time
from pathlib import Path

from inlay.adapters.file import CONFIG
from inlay.adapters.weight_file import find_weights
from inlay.errors import BadInput, InlayError
from inlay.serve.server.logs import FACTS
from inlay.serve.server.service import Service

log = logging.getLogger(__name__)
PAUSE_S = 1.0  # between two looks
SHARE = 0.1  # of the time, at most, is spent on looking: a slow file system is looked at less often

State = tuple[tuple[int, ...] | None, ...]  # of a folder's files: which they are, their sizes and times


class FolderWatch:
    """Adds, replaces and removes adapters as their folders come, change and go.

    Args:
        service: That serves them.
        folder: That holds a folder for each adapter.

    Raises:
        BadInput: It is no folder, or an adapter itself.
    """

    def __init__(self, service: Service, folder: str | Path) -> None:
        self.service = service
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir() or (self.folder / CONFIG).is_file():
            raise BadInput(f"{folder} cannot be watched; give one folder that holds a folder for each adapter.")
        self._seen: dict[str, State] = {}
        self._settled: dict[str, State] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inlay-watch", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def look(self) -> None:
        """Look once, and act on what is as it was the last time and differs from what is served.

        Raises:
            OSError: The folder cannot be read; nothing is removed for that.
        """
        found = self._read_states()
        for name, state in found.items():
            if state == self._seen.get(name) and state != self._settled.get(name):
                self._settled[name] = state
                self._add(name)
        for name in self._settled.keys() - found.keys():
            if name not in self._seen:
                del self._settled[name]
                self._remove(name)
        self._seen = found

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            started = time.monotonic()
            try:
                self.look()
            except OSError as error:
                log.warning("the folder cannot be looked at: %s", error)
            except Exception:
                log.exception("a look at the folder failed")
            pause = max(PAUSE_S, (time.monotonic() - started) / SHARE)

    def _read_states(self) -> dict[str, State]:
        with os.scandir(self.folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        folders = (self.folder / name for name in names)
        return {folder.name: _read_state(folder) for folder in folders if (folder / CONFIG).is_file()}

    def _add(self, name: str) -> None:
        service = self.service
        try:
            service.add_adapter(self.folder / name, name)
        except InlayError as error:
            served_on = name in service.bank.names
            if not served_on:
                service.refused[name] = str(error)
            facts = {"adapter": name, "reason": str(error), "served_on": served_on}
            log.warning("adapter refused", extra={FACTS: facts})

    def _remove(self, name: str) -> None:
        service = self.service
        service.refused.pop(name, None)
        if name in service.bank.names and Path(service.bank.find_path(name)) == self.folder / name:
            service.remove_adapter(name)


def _read_state(folder: Path) -> State:
    return tuple(_read_stat(path) for path in (folder, folder / CONFIG, find_weights(folder)))


def _read_stat(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    if path.is_dir():
        return (stat.st_ino,)  # files that come and go within it change its time
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)
