"""Reading large annotation files element by element, so that memory does not grow with them.

COCO's captions of one split are 90 MB of JSON, Karpathy's file 140 MB; parsed whole they are ten times that in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, TextIO

from readroom.errors import BadCall

CHUNK_CHARACTERS = 256 * 1024
# The largest element there is (an image with its sentences and tokens) has 3 kB; what does not end is no annotation.
MAX_ELEMENT_CHARACTERS = 16 * 1024 * 1024
SPACES = " \t\n\r"


class JsonStream:
    """A window on a JSON text that moves forward."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._is_ended = file, "", 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in SPACES:
                    return self._text[self._at]
                self._at += 1
            if not self._read_more():
                return ""

    def take(self, expected: str) -> None:
        """Go past one character. Raises BadCall when it is another one."""
        if self.peek() != expected:
            raise malformed()
        self._at += 1

    def take_value(self) -> Any:
        """The next value, whole. Raises BadCall when it is malformed, cut, or longer than 16 million characters."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except JSONDecodeError:
                value, end = None, len(self._text)
            except RecursionError:
                raise malformed() from None
            # A number that ends with the window may go on behind it, so a value must be followed by something.
            if end < len(self._text) or (self._is_ended and end > self._at and value is not None):
                self._at = end
                return value
            if len(self._text) - self._at > MAX_ELEMENT_CHARACTERS or not self._read_more():
                raise malformed()

    def iter_array(self) -> Iterator[Any]:
        """The elements of the array that comes next."""
        self.take("[")
        while self.peek() != "]":
            yield self.take_value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def skip_value(self) -> None:
        """Go past the next value; past an array element by element."""
        if self.peek() != "[":
            self.take_value()
            return
        for _ in self.iter_array():
            pass

    def iter_keys(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller takes each key's value before asking for the next."""
        self.take("{")
        while self.peek() != "}":
            key = self.take_value()
            self.take(":")
            yield str(key)
            if self.peek() != "}":
                self.take(",")

    def _read_more(self) -> bool:
        # The window grows by what it holds: an element of n characters is tried log(n) times, not n.
        held = self._text[self._at :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(held)))
        self._text, self._at, self._is_ended = held + more, 0, not more
        return bool(more)


def iter_elements(file: TextIO, key: str) -> Iterator[dict[str, Any]]:
    """The objects of `key`'s array in a JSON object; or those of the array that the file is.

    What is no object is passed over as an empty one. Raises BadCall for a malformed or cut file.
    """
    stream = JsonStream(file)
    try:
        yield from _as_objects(stream.iter_array() if stream.peek() == "[" else _find_array(stream, key))
    except UnicodeDecodeError:
        raise malformed() from None


def _find_array(stream: JsonStream, key: str) -> Iterator[Any]:
    for name in stream.iter_keys():
        if name == key and stream.peek() == "[":
            yield from stream.iter_array()
            return
        stream.skip_value()


def _as_objects(values: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for value in values:
        yield value if isinstance(value, dict) else {}


def malformed() -> BadCall:
    """The error for a file that is not JSON, or is cut."""
    return BadCall("the annotation file is no valid JSON, or cut off", "Download it again.")
