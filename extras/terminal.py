"""What is printed: control characters shown escaped, and streams that may be closed or full.

A picture that was drawn is not lost because nobody reads its name.
"""
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# C0 and C1 (among them ESC, which starts terminal commands), DEL, line and paragraph separators,
# the marks that turn the direction of text, and lone surrogates
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text in one line: tabs as they are, other control characters as \\x1b and the like."""
    def escaped(match: re.Match) -> str:
        return match[0] if match[0] == "\t" else match[0].encode("unicode_escape").decode()
    return CONTROL.sub(escaped, str(text))


def complain(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


class TolerantStream(io.TextIOBase):
    """A stream of text that goes on without a word when its other end is closed or full.

    Characters that it has no code for are written escaped.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.failed = stream, False

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        encoded = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self.attempt(lambda: self.stream.write(encoded))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, what) -> None:
        if self.failed:
            return
        try:
            what()
        except (OSError, ValueError):   # ValueError: Python's side is closed
            self.failed = True
            self.discard()

    def discard(self) -> None:
        """What Python still holds for the stream must go somewhere when it ends."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return not self.failed and self.stream.isatty()


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Inside, print and messages never fail. A stream that is not there writes nowhere."""
    before = sys.stdout, sys.stderr
    opened = [open(os.devnull, "w", encoding="utf-8") if one is None else one for one in before]
    sys.stdout, sys.stderr = map(TolerantStream, opened)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
