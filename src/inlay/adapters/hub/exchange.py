"""An exchange with the Hub: tried again where waiting can help, and explained in one sentence without a token."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from inlay.errors import BadInput, InlayError, Unreachable

WAITS = (1, 4, 16)  # seconds before another try
PASSING = {408, 409, 412, 429, 500, 502, 503, 504}  # 409, 412: another commit came first
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this huggingface_hub uses
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def check_name(repo: str) -> None:
    """Raise InlayError unless it is user/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"{repo!r} is no name on the Hub ({error}); give user/name.") from None
    if repo.count("/") != 1:
        raise BadInput(f"{repo!r} names no user or organisation; give user/name.")


def retry_exchange(action: Callable[[], Result], repo: str, token: str | None) -> Result:
    """What an exchange with the Hub gives, tried again where waiting can help.

    Raises:
        InlayError: It failed for good; its sentence says what to do and holds no token.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except InlayError:
            raise
        except (OSError, ValueError, RuntimeError, _HTTP_ERROR) as error:  # type: ignore[misc]
            cause = _cause(error)
            if wait is None or not _passing(cause):
                raise Unreachable(_hide(_explain(cause, repo), token)) from None
            logger.warning("%s: %s; trying again in %d s", repo, _hide(_first_line(cause), token), wait)
        time.sleep(wait)
    raise AssertionError("unreachable: the last wait is None")


def _cause(error: BaseException) -> BaseException:
    """What lies behind the errors in which huggingface_hub wraps others."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passing(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    lost = isinstance(error, ConnectionError | TimeoutError | _HTTP_ERROR)
    return lost or "Consistency check failed" in str(error)


def _explain(error: BaseException, repo: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} needs the Hub, but this process is offline: unset HF_HUB_OFFLINE."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision; look at its commits on the Hub."
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in to the Hub, as {repo} needs: run `hf auth login`, or set HF_TOKEN."
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not accept the token for {repo} (401): run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms on its page on the Hub, logged in as who you are here."
    if isinstance(error, RepositoryNotFoundError):
        hint = "" if get_token() else ", and nobody is logged in: run `hf auth login`, or set HF_TOKEN"
        return f"the Hub has no {repo!r}, or not for you{hint}."
    if status == 403:
        return f"this token may not write to {repo} (403): take one with the right to write, or another name."
    tried = "; try the same again later, what has arrived is kept" if _passing(error) else ""
    return f"the Hub does not do what {repo} needs ({_first_line(error)}){tried}."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _hide(text: str, token: str | None) -> str:
    """The text without the token, which a server or a proxy may send back in its error."""
    for secret in (token, get_token()):
        text = text.replace(secret, "(token)") if secret else text
    return TOKEN.sub(b"(token)", text.encode()).decode()
