"""Run a server until it is told to stop; what it has accepted is answered first."""

import uvicorn

from inlay.serve.server.app import make_app
from inlay.serve.server.service import Service

DRAIN_S = 60  # how long a stopping server answers what it has accepted


def run_server(service: Service, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGTERM or SIGINT; then take no more, and end once the accepted ones are answered.

    Args:
        service: Answers requests.
        host: Address to listen at; 0.0.0.0 is every network of this machine.
        port: To listen at; 0 is any that is free.
    """
    config = uvicorn.Config(
        make_app(service),
        host=host,
        port=port,
        log_level="info",
        timeout_graceful_shutdown=DRAIN_S,
        server_header=False,
    )
    uvicorn.Server(config).run()
