"""The server's log: JSON lines on stderr. Logging never delays a request."""

import contextlib
import logging
import os
import queue
import sys
import threading
import time

import orjson

LINES = 10_000
"""Maximum number of lines waiting to be written. If nothing reads stderr, for example, further lines are dropped."""


class JsonLines(logging.Handler):
    """Writes each record as one line of JSON with the time, the level, the message and the record's `fields`.

    A separate thread writes the lines, because writing to a full pipe that nothing reads would block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes | None] = queue.Queue(LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record to be written as a line."""
        time_ = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z"
        fields = {"time": time_, "level": record.levelname.lower(), "message": record.getMessage()}
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(
                orjson.dumps(fields | getattr(record, "fields", {}), option=orjson.OPT_APPEND_NEWLINE)
            )

    def close(self) -> None:
        """Waits for the queued lines to be written, but for no more than two seconds."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(2)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), line)
