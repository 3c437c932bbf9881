"""What processes of a run print, as log lines: with the time in front, or as JSON objects."""

import contextlib
import errno
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEVELS = {"k4p1: warning: ": "warning", "k4p1: ": "error", "ALARM: ": "alarm"}


class LogStream(io.TextIOBase):
    """A text stream that passes on whole lines, each `2026-01-31T12:00:00.000Z text`, or a JSON object.

    A line for which its file has no room is given up, or written with the next one.

    Args:
      stream: where the lines go.
      as_json: objects with `time`, `level` (`info`, `warning`, `alarm`, `error`), `text`, and the fields of `record`.
    """

    def __init__(self, stream: TextIO, as_json: bool):
        self._stream, self._as_json = stream, as_json
        self._begun = threading.local()  # print() writes a line and its end one after the other

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun.text = (getattr(self._begun, "text", "") + text).split("\n")
        for line in lines:
            self.record(line.rpartition("\r")[2])
        return len(text)

    def record(self, text: str, **fields: Any) -> None:
        """A line, with more fields where lines are objects."""
        if not text.strip():
            return
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        if self._as_json:
            prefix = next((prefix for prefix in _LEVELS if text.startswith(prefix)), "")
            level, plain = _LEVELS.get(prefix, "info"), text if prefix == "ALARM: " else text.removeprefix(prefix)
            text = json.dumps({"time": moment, "level": level, "text": plain, **fields})
        else:
            text = f"{moment} {text}"
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except OSError as e:  # a full disk costs lines, not the run
            if e.errno not in _NO_ROOM:
                raise

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def logging(as_json: bool, streams: tuple[str, ...] = ("stderr",)) -> Iterator[None]:
    """Makes log lines of what is printed, unless a terminal shows it; `as_json` does so in any case, for both streams."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if as_json or (name in streams and not stream.isatty()):
            setattr(sys, name, LogStream(stream, as_json))
    try:
        yield
    finally:
        for name, stream in before.items():
            if isinstance(changed := getattr(sys, name), LogStream):
                changed.write("\n")  # what has no end of line yet
            setattr(sys, name, stream)


def record(text: str, **fields: Any) -> None:
    """Prints a line to stderr; as an object it has these fields, too."""
    if isinstance(sys.stderr, LogStream):
        sys.stderr.record(text, **fields)
    else:
        print(text, file=sys.stderr, flush=True)


def text_of(line: str) -> str:
    """What a line says, whichever form it has."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["text"])
    return line
