"""Structured log lines on stderr, as text or as JSON."""

import json
import logging
import sys
import time

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


def configure(as_json: bool) -> None:
    """Sends INFO and above of every logger to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
