"""HTTP/1.1 connections to one server, kept open from request to request.

h11 reads and writes the protocol: a request takes 0.12 ms of CPU here, with httpx 1.3 ms, which would compete with a
server on the same cores.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from inlay.errors import BadInput

CHUNK = 1 << 16


@dataclass
class Response:
    """What a server answered.

    Attributes:
        status: Of HTTP.
        parts: Of the body, as they came, each with its time by `time.perf_counter`.
    """

    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(part for _, part in self.parts)

    def read_json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Connections:
    """The connections to one server: one that is idle is used again, and a new one opened where there is none.

    Args:
        url: Such as "http://127.0.0.1:8000"; a path in it stands before all targets.
        headers: Of every request.

    Raises:
        BadInput: Not the URL of a server.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000.")
        self.url = parts.geturl().rstrip("/")
        self._host, self._ssl = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._path = parts.path.rstrip("/")
        self._headers = [("host", parts.netloc), *(headers or {}).items()]
        self._idle: list[_Connection] = []

    async def ask(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a request and read its answer. Who cancels this closes the connection.

        Raises:
            OSError: No connection, or it broke.
            h11.RemoteProtocolError: What came is not HTTP, or ended too early.
        """
        connection = await self._take()
        sent = [*self._headers, *(headers or {}).items(), ("content-length", str(len(body)))]
        try:
            response = await connection.exchange(
                h11.Request(method=method, target=self._path + target, headers=sent), body
            )
        except BaseException:
            connection.close()
            raise
        if connection.is_reusable():
            self._idle.append(connection)
        else:
            connection.close()
        return response

    async def _take(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
            connection.close()
        return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._ssl))

    def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop().close()


class _Connection:
    """One connection, and where it stands in the protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._protocol = h11.Connection(h11.CLIENT)

    async def exchange(self, request: h11.Request, body: bytes) -> Response:
        """Send one request and read what is answered."""
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            self._writer.write(self._protocol.send(part) or b"")
        await self._writer.drain()
        response = Response()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(await self._reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                response.status = event.status_code
            elif isinstance(event, h11.Data):
                response.parts.append((time.perf_counter(), bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                return response

    def is_reusable(self) -> bool:
        """Whether another request may follow; the connection is then ready for it."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        self._protocol.start_next_cycle()
        return True

    def is_closed(self) -> bool:
        """Whether the server has closed it meanwhile."""
        return self._reader.at_eof() or self._writer.is_closing()

    def close(self) -> None:
        """Without waiting for the other end."""
        self._writer.close()
