"""What a server refuses, with the HTTP status of each refusal."""

from pathlib import Path
from typing import ClassVar

from inlay.adapters.file import expand_path
from inlay.errors import InlayError


class Refusal(InlayError):
    """A request that is not answered.

    Attributes:
        status: Of the HTTP answer.
    """

    status: ClassVar[int] = 400


class NotAllowed(Refusal):
    """The server does not load adapters from there."""

    status = 403


class UnknownAdapter(Refusal):
    """The server has no adapter of that name."""

    status = 404


class UnknownScan(Refusal):
    """The server does not hold, or no longer holds, what is asked about."""

    status = 404


class DoesNotFit(Refusal):
    """The adapter cannot be used on this base, or its file is damaged. The base never answers in its place."""

    status = 409


class TooLarge(Refusal):
    """The request is over a limit of the server."""

    status = 413


class TooSlow(Refusal):
    """The body of the request did not arrive in time."""

    status = 408


class Busy(Refusal):
    """The queue is full.

    Attributes:
        retry_after_s: When there is likely room again, in whole seconds.
    """

    status = 429

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(Refusal):
    """The server answers what it has accepted, and ends."""

    status = 503


class TooLate(Refusal):
    """The deadline of the request passed before it was answered."""

    status = 504


class Replaced(Refusal):
    """The adapter's file was replaced between reading the request and answering it; the request is read once more."""

    status = 503


def name_misfit(error: InlayError, name: str, path: str | Path) -> str:
    """The sentence of an error about an adapter, which is called by its name where its folder stood.

    Args:
        error: What is wrong with it.
        name: Of the adapter.
        path: Its folder or Hub id.
    """
    text = str(error)
    folder = expand_path(path)
    for each in sorted({str(path), str(folder), str(folder.resolve())}, key=len, reverse=True):
        if "/" in each:  # a bare name tells nothing, and may be part of a word
            text = text.replace(each, name)
    return text if name in text else f"adapter {name!r}: {text}"
