"""What all routes share: an answer's signature, errors in the form of each protocol, and clients that leave."""

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from inlay.errors import BadInput
from inlay.serve.server.refusals import TooLarge
from inlay.serve.server.service import Signature

T = TypeVar("T")
MOST_LISTS, MOST_VALUES = 500_000, 5_000_000  # of JSON
LONGEST_MESSAGE = 2_000  # characters of an error


async def run_unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Args:
        request: Whose body has been read.
        work: A coroutine.

    Raises:
        HTTPException: The client is gone; nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client closed the connection.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def name_signature(signature: Signature) -> dict[str, str]:
    """What every answer says of what computed it."""
    return {
        "model": signature.adapter,
        "adapter_digest": signature.digest,
        "base": signature.base,
        "base_digest": signature.base_digest,
    }


def parse_object(content: bytes, refusal: str) -> dict[str, Any]:
    """The JSON object of a body.

    Args:
        content: The body.
        refusal: The sentence where it is no JSON.

    Raises:
        BadInput: It is no JSON, or no object.
        TooLarge: It has too many values.
    """
    check_json_size(content)
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(refusal) from error
    if not isinstance(given, dict):
        raise BadInput(f"the body must be a JSON object, got {type(given).__name__}.")
    return given


def check_json_size(content: bytes) -> None:
    """Refuse JSON that would take long to read, while all other requests wait, or much memory.

    A list takes 30 times the two bytes in which it is written: 64 MB of empty lists took 14 s and 1.6 GB.

    Raises:
        TooLarge: It has too many values.
    """
    if content.count(b"[") + content.count(b"{") > MOST_LISTS or content.count(b",") > MOST_VALUES:
        raise TooLarge(
            f"JSON may have {MOST_LISTS:,} lists and {MOST_VALUES:,} values at most; send an image or scan as a file, "
            "a tensor as binary data."
        )


# A path in quotes, which may have spaces, or one without; the last part, which stays, is not matched.
_PATHS = re.compile(r"""(?<=['"])~?/(?:[^'"\n/]+/)+(?=[^'"\n/]*['"])|(?<![\w.:/])~?/(?:[^\s'",:;()/]+/)+""")


def hide_paths(text: str) -> str:
    """A sentence whose paths are cut to their last part: a client needs to know nothing of the machine."""
    return _PATHS.sub("", text)


def make_error(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the form of the protocol to which a path belongs."""
    body: Any = _make_readable(message) if path.startswith("/v2") else make_error_body(status, message)
    return JSONResponse({"error": body}, status, headers=dict(headers or {}))


def make_error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": _make_readable(message), "type": kind, "code": status}


def _make_readable(message: str) -> str:
    """Short, without paths, and without halves of characters, which no JSON can hold.

    A message may repeat what a client has sent.
    """
    return hide_paths(message[:LONGEST_MESSAGE]).encode(errors="replace").decode()
