"""`inlay serve` as a process of its own, and what it takes."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PATIENCE_S = 300


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers.

    Attributes:
        url: Where it listens.
        process: That it is.
    """

    url: str
    process: subprocess.Popen[bytes]

    @property
    def cpu_s(self) -> float:
        """CPU time until now."""
        fields = self._read("stat").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mb(self) -> float:
        """What is resident now."""
        (line,) = (line for line in self._read("status").splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e6

    @property
    def threads(self) -> int:
        """Their number."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    @property
    def files(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


def start_server(
    base: str,
    adapters: Sequence[str | Path],
    *options: str,
    threads: int | None = None,
    log: IO[str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> ServerProcess:
    """A server that has begun to listen.

    Args:
        base: Name or folder.
        adapters: A folder of adapters, or adapters.
        *options: Of `inlay serve`.
        threads: Of torch; default: as many as there are cores.
        log: Where its lines go.
        variables: Of its environment, besides those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= variables or {}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    code = "from inlay.cli.app import main; main()"
    command = [sys.executable, "-c", code, "serve", base, *map(str, adapters), "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log or subprocess.DEVNULL)
    return ServerProcess(f"http://127.0.0.1:{port}", process)


def wait_until_ready(server: ServerProcess) -> None:
    """Wait for its first answer.

    Raises:
        RuntimeError: It ended, or does not answer.
    """
    for _ in range(PATIENCE_S * 10):
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def look_at(server: ServerProcess) -> dict[str, float]:
    """Its memory, open files and threads now."""
    return {"memory_mb": round(server.memory_mb, 1), "files": server.files, "threads": server.threads}


@contextmanager
def serve(base: str, adapters: Sequence[str | Path], *options: str, **more: Any) -> Iterator[ServerProcess]:
    """A server as `start_server` starts it, which answers inside the block."""
    server = start_server(base, adapters, *options, **more)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.process.terminate()
        server.process.wait()
