"""What a server says on stderr: one line for each request and event, as JSON or as text."""

import json
import logging
import sys
import time
from typing import Any, Literal

from typing_extensions import override

LogFormat = Literal["text", "json"]
FACTS = "facts"  # what a record holds besides its message: `log.info("...", extra={FACTS: {...}})`


class _JsonLines(logging.Formatter):
    """{"time": "2026-11-30T01:52:22.120Z", "level": "info", "message": ..., and the facts of the record}."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _write_time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, FACTS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TextLines(logging.Formatter):
    """2026-11-30T01:52:22.120Z info message key=value ..."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        words = [_write_time(record), record.levelname.lower(), record.getMessage()]
        words += [f"{key}={_quote(value)}" for key, value in getattr(record, FACTS, {}).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logs(form: LogFormat) -> None:
    """Write what inlay and uvicorn log, and warnings of all libraries, to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("inlay").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _write_time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _quote(value: Any) -> str:
    """As JSON where a space or a control character in it could be mistaken for the next fact, or for the next line."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)
