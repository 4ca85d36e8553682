"""Structured log lines on stderr, as text or as JSON."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from typing import TextIO

FIELDS = "fields"
"""Name of the `extra` entry that carries the structured fields of a record."""


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message key=value ...`, with the traceback below."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields: dict[str, object] = getattr(record, FIELDS, {})
        parts = [_stamp(record), record.levelname, record.name, record.getMessage()]
        parts += [f"{name}={value}" for name, value in fields.items()]
        text = " ".join(parts)
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, and the traceback."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        entry: dict[str, object] = {
            "time": _stamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, FIELDS, {}))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes each line as it comes, or many at once.

    To write gives the interpreter up. Where other threads want it, too, getting it back takes
    longer than everything else about a line.
    """

    _held: list[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        if self._held is None:
            super().emit(record)
            return
        try:
            self._held.append(self.format(record) + self.terminator)
        except Exception:  # told on stderr and no more, as by every handler
            self.handleError(record)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keeps the lines of all threads, and writes them at the end."""
        self.acquire()
        held: list[str] = []
        self._held = held
        self.release()
        try:
            yield
        finally:
            self.acquire()
            try:
                self._held = None
                self.stream.write("".join(held))
                self.flush()
            except (OSError, ValueError):  # stderr is gone: nobody is left to be told
                pass
            finally:
                self.release()


@contextmanager
def gathered() -> Iterator[None]:
    """Has what is logged inside written at once; for milliseconds, and not to be nested."""
    with ExitStack() as handlers:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _Lines):
                handlers.enter_context(handler.holding())
        yield


def configure(as_json: bool) -> None:
    """Sends INFO and above of every logger to stderr."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
