"""What a server refuses, with the HTTP status of each refusal."""

from typing import ClassVar

from inlay.errors import InlayError


class Refusal(InlayError):
    """A request that is not answered.

    Attributes:
        status: Of the HTTP answer.
    """

    status: ClassVar[int] = 400


class UnknownAdapter(Refusal):
    """The server has no adapter of that name."""

    status = 404


class DoesNotFit(Refusal):
    """The adapter cannot be used on this base, or its file is damaged. The base never answers in its place."""

    status = 409


class TooLarge(Refusal):
    """The request is over a limit of the server."""

    status = 413


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
