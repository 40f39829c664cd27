"""Files that clients send once and ask about several times; held in memory, for a while."""

import time
from collections import OrderedDict
from collections.abc import Hashable

from inlay.serve.server.refusals import UnknownScan

BODIES = 8  # of the largest size, that all files together may take
FILES = 64
LIFETIME_S = 3600.0  # since a file was last asked about


class Uploads:
    """Bounded in number, size and time; the least recently used give way.

    Args:
        max_bytes: Of one file.
    """

    def __init__(self, max_bytes: int) -> None:
        self.most = BODIES * max_bytes
        self._files: OrderedDict[Hashable, tuple[bytes, float]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(data) for data, _ in self._files.values())

    def put(self, key: Hashable, data: bytes) -> None:
        """Hold a file, in the place of one with that key."""
        self._expire()
        self._files.pop(key, None)
        self._files[key] = data, time.monotonic()
        while len(self._files) > 1 and (len(self._files) > FILES or self.size > self.most):
            self._files.popitem(last=False)

    def get(self, key: Hashable, name: str) -> bytes:
        """A file, which is now the one used last.

        Args:
            key: It was put under.
            name: For the message.

        Raises:
            UnknownScan: It never was there, or is no more.
        """
        self._expire()
        if key not in self._files:
            raise UnknownScan(f"the server holds no {name}; send the scan again.")
        data, _ = self._files.pop(key)
        self._files[key] = data, time.monotonic()
        return data

    def remove(self, key: Hashable, name: str) -> None:
        """Hold a file no longer; raises as `get`."""
        self.get(key, name)
        del self._files[key]

    def _expire(self) -> None:
        oldest = time.monotonic() - LIFETIME_S
        while self._files and next(iter(self._files.values()))[1] < oldest:
            self._files.popitem(last=False)
