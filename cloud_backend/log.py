"""The log on stderr: text for people, or one JSON object a line for programs. Names and counts, never content."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, get_args

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)


class JSONFormatter(logging.Formatter):
    """One object a line: time (UTC), level, message, and the fields given as `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_to_stderr(style: LogFormat) -> None:
    """Sends the process's log to stderr, without what libraries have to say of ordinary events."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if style == "json" else logging.Formatter("stip-cloud: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("websockets", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)
