"""Structured logs: one JSON object a line, without a word of what clients wrote."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

SPOKEN = ("ddt_llama", "uvicorn", "py")  # whose messages are written; "py" are warnings


class JsonLines(logging.Formatter):
    """Time, level, event and fields; of an exception where it was raised, but not its message.

    Messages of exceptions quote what was given, and that may be a prompt; those of other libraries
    may, too: of them the name of the logger is written, and the place.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.name.partition(".")[0] not in SPOKEN:
            line |= {"event": record.name, "at": f"{record.filename}:{record.lineno}"}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["trace"] = [f"{one.name} ({one.filename}:{one.lineno})" for one in frames]
        return json.dumps(line)


def write_json_lines(level: int = logging.INFO) -> None:
    """Send all logs to standard error, as JSON: of libraries, and of Python, what is a warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("ddt_llama").setLevel(level)
    logging.captureWarnings(True)
