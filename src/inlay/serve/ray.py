"""Several replicas of a server, one for each GPU or share of the CPUs, on one machine or many, behind Ray Serve.

    from ray import serve
    from inlay.serve.ray import make_application
    serve.run(make_application("google/vit-base-patch16-224", "/shared/adapters", replicas=4, num_gpus=1, budget_mb=2000))

Every replica serves all adapters by all routes. The entrance reads which one a request names, and Ray prefers a replica
that has it in memory (model multiplexing, https://docs.ray.io/en/latest/serve/model-multiplexing.html).
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.types import Message, Scope

from inlay.serve.bank import Bank
from inlay.serve.server.answers import make_error
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service

PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")  # of a request
PATH = re.compile(r"/v[12]/models/([^/]+)")
FIELD = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")|name="?model"?\r\n\r\n([^\r\n]*)')  # of JSON, of a form


def make_application(
    base: str,
    adapters: str | Path | Sequence[str],
    *,
    replicas: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    config: ServiceConfig | None = None,
    **bank: Any,
) -> serve.Application:
    """What `ray.serve.run` takes.

    Args:
        base: Name, Hub id, or a folder that every machine has.
        adapters: As `Bank` takes them, where every machine finds them.
        replicas: Each has a process, a base and a bank of its own.
        num_gpus: Of a replica; 0.5 lets two share one.
        num_cpus: Of a replica, and threads of torch.
        config: Bounds, of each replica.
        **bank: Options of `Bank`.
    """
    config, share = config or ServiceConfig(), {"num_cpus": num_cpus, "num_gpus": num_gpus}
    many = 2 * config.max_queue  # Ray lets so many in; the queue's own limit answers 429
    replica = serve.deployment(Replica, num_replicas=replicas, ray_actor_options=share, max_ongoing_requests=many).bind(
        base, adapters, config, bank
    )
    entrance = serve.deployment(Entrance, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=many * replicas)
    return entrance.bind(replica, int(config.max_body_mb * 1e6))


class Entrance:
    """Hands requests on to replicas.

    Args:
        replicas: Of `Replica`.
        max_bytes: Of a body.
    """

    def __init__(self, replicas: DeploymentHandle, max_bytes: int) -> None:
        self.replicas, self.max_bytes = replicas, max_bytes

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica, part by part."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_bytes:
                return make_error(request.url.path, 413, f"a request may have {self.max_bytes:,} bytes at most.")
        name = find_adapter(request.url.path, body)
        scope = {key: request.scope[key] for key in PASSED_ON if key in request.scope}
        messages = self.replicas.options(stream=True, multiplexed_model_id=name).answer.remote(scope, bytes(body))
        start = await anext(aiter(messages))
        response = StreamingResponse((message["body"] async for message in messages), start["status"])
        response.raw_headers = start["headers"]
        return response


class Replica:
    """A server without a port of its own.

    Args:
        base: As `Bank` takes it.
        adapters: As `Bank` takes them.
        config: Bounds.
        bank: Options of `Bank`.
    """

    def __init__(self, base: str, adapters: Any, config: ServiceConfig, bank: dict[str, Any]) -> None:
        self.service = Service(Bank(base, adapters, skip_unfit=True, **bank), config)
        self.app = make_app(self.service)
        with self.service.bank.rows(self.service.bank.names[:1]):
            room = self.service.bank.room or -1  # known once an adapter is in memory; -1: without a limit

        @serve.multiplexed(max_num_models_per_replica=room)
        async def hold(name: str) -> str:
            return name

        self.hold = hold
        self.service.start()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of an ASGI application."""
        if (name := serve.get_multiplexed_model_id()) in self.service.bank.names:
            await self.hold(name)  # from here on Ray knows that it is here
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Message:
            return next(received, None) or await asyncio.Future()  # the client is there as long as this generator is

        running = asyncio.create_task(self.app(scope, receive, messages.put))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while message := await messages.get():
                yield message
        finally:
            running.cancel()

    def __del__(self) -> None:
        self.service.stop()


def find_adapter(path: str, body: bytes | bytearray) -> str:
    """The adapter that a request names; empty where it names none. A wrong one only makes a slower choice of replica."""
    if found := PATH.match(path):
        return unquote(found[1])
    if not (field := FIELD.search(body)):
        return ""
    try:
        return str(json.loads(field[1])) if field[1] else field[2].decode()
    except ValueError:
        return ""
