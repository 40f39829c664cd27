"""Several replicas of a server, one for each GPU or share of the CPUs, on one machine or many, behind Ray Serve.

    from ray import serve
    from inlay.serve.ray import make_application
    serve.run(make_application("/shared/vit-base", "/shared/adapters", replicas=4, num_gpus=1, budget_mb=2000))

Every replica serves all adapters by all routes. The entrance reads which one a request names, and Ray prefers a replica
that has it in memory (model multiplexing, https://docs.ray.io/en/latest/serve/model-multiplexing.html).
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.types import Message, Scope

from inlay.bases.load import Dtype
from inlay.serve.bank import Bank
from inlay.serve.server.answers import make_error
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service, open_bank

PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
# Where a request names its adapter: the path, JSON, a form.
NAMED = re.compile(rb'^/v[12]/models/([^/]+)|"model"\s*:\s*"([^"\\]+)"|name="?model"?\r\n\r\n([^\r\n]+)')


def make_application(
    base: str,
    adapters: Any,
    *,
    replicas: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    budget_mb: float | None = None,
    dtype: Dtype | Literal["auto"] = "float32",
    config: ServiceConfig | None = None,
) -> serve.Application:
    """What `ray.serve.run` takes.

    Args:
        base: A name, a Hub id, or a folder that every machine has.
        adapters: As `Bank` takes them, where every machine finds them.
        replicas: Each has a process, a base and a bank of its own.
        num_gpus: Of a replica; two with 0.5 share one.
        num_cpus: Of a replica, which are torch's threads too.
        budget_mb: As for `Bank`, of each replica.
        dtype: As for `Bank`.
        config: Bounds of each replica.
    """
    config, share = config or ServiceConfig(), {"num_gpus": num_gpus, "num_cpus": num_cpus}
    many = 2 * config.max_queue  # Ray lets so many in, so that it is the server which says that its queue is full
    replica = serve.deployment(Replica, num_replicas=replicas, ray_actor_options=share, max_ongoing_requests=many)
    entrance = serve.deployment(Entrance, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=many * replicas)
    return entrance.bind(replica.bind(base, adapters, budget_mb, dtype, config), int(config.max_body_mb * 1e6))


class Entrance:
    """Hands each request on to a replica.

    Args:
        replicas: Of `Replica`.
        max_bytes: Of a body.
    """

    def __init__(self, replicas: DeploymentHandle, max_bytes: int) -> None:
        self.replicas, self.max_bytes = replicas, max_bytes

    async def __call__(self, request: Request) -> Response:
        """The answer of the replica, in parts as they come."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_bytes:
                return make_error(request.url.path, 413, f"a body may have {self.max_bytes:,} bytes at most.")
        scope = {key: request.scope[key] for key in PASSED_ON if key in request.scope}
        replicas = self.replicas.options(stream=True, multiplexed_model_id=find_adapter(request.url.path, body))
        messages = aiter(replicas.answer.remote(scope, bytes(body)))
        start = await anext(messages)
        response = StreamingResponse((message["body"] async for message in messages), start["status"])
        response.raw_headers = start["headers"]
        return response


class Replica:
    """A server without a port: the arguments are those of `make_application`."""

    def __init__(self, base: str, adapters: Any, budget_mb: float | None, dtype: Any, config: ServiceConfig) -> None:
        opened = open_bank(base, adapters, budget_mb=budget_mb, dtype=dtype)
        self.service = Service(opened, config)
        self.app = make_app(self.service)
        self.service.start()
        room = -1  # as many as there are
        if isinstance(opened, Bank):
            with opened.rows(opened.names[:1]):
                room = opened.room or room  # known once an adapter is in memory
        self.note_use = serve.multiplexed(max_num_models_per_replica=room)(_return_name)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """What the application sends."""
        if (name := serve.get_multiplexed_model_id()) in self.service.bank.names:
            await self.note_use(name)  # Ray knows from here on that it is in memory
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received = iter([{"type": "http.request", "body": body}])

        async def receive() -> Message:
            return next(received, None) or await asyncio.Future()  # the client is there as long as this generator is

        running = asyncio.create_task(self.app(dict(scope), receive, sent.put))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while message := await sent.get():
                yield message
        finally:
            running.cancel()

    def check_health(self) -> None:
        """Ray starts a replica anew that has failed."""
        assert self.service.state != "failed", "the thread that computes has ended; the log says why"

    def __del__(self) -> None:
        self.service.stop(timeout_s=60)


async def _return_name(name: str) -> str:
    return name


def find_adapter(path: str, body: bytes | bytearray) -> str:
    """The adapter that a request names, or an empty name. A wrong one makes a slower choice, and no wrong answer."""
    found = NAMED.match(path.encode()) or NAMED.search(body)
    return next(filter(None, found.groups())).decode(errors="replace") if found else ""
