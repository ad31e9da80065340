"""Logging of every process: text or JSON lines on stderr, each with its process and, where known, its request."""

import json
import logging
import sys
import time
from contextvars import ContextVar

# Set by whoever works on a request; log lines of that task carry it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "warning": logging.WARNING, "info": logging.INFO}
LEVELS |= {"debug": logging.DEBUG, "trace": logging.DEBUG, "off": logging.CRITICAL + 1}


class _Formatter(logging.Formatter):
    """What both forms share: the process's name and the moment in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process: str):
        super().__init__()
        self._process = process


class TextFormatter(_Formatter):
    """`time LEVEL process [request] message`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it where there is one."""
        request = request_id.get()
        where = f"{self._process} [{request}]" if request else self._process
        line = f"{self.formatTime(record)} {record.levelname:<7} {where}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(_Formatter):
    """One JSON object a line, with the keys of TGI's JSON log."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, tracebacks included."""
        fields = {
            "timestamp": self.formatTime(record),
            "level": record.levelname,
            "fields": {"message": record.getMessage()},
            "target": record.name,
            "process": self._process,
        }
        if request := request_id.get():
            fields["request_id"] = request
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def parse_level(text: str) -> int:
    """The level that a LOG_LEVEL text asks for; filters of single modules (`info,x=debug`) are passed over."""
    for part in text.lower().split(","):
        if part.strip() in LEVELS:
            return LEVELS[part.strip()]
    return logging.INFO


def set_up(process: str, *, json_output: bool = False, level: str = "info") -> None:
    """Send all logging of this process to stderr; `process` names it on each line: launcher, api, engine-0."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if json_output else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(parse_level(level))
    # Their own lines name every HTTP request to the hub.
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
