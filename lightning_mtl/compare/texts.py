"""Texts of any length and with any letters, made fit for a console, a page and a picture."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO

LONGEST_ERROR = 4000  # characters of an error that its record keeps; its log has all of it
_LONGEST_NAME = 60
_LONGEST_LINE = 400


def visible(text: str, keep: str = "\n\t") -> str:
    """``text`` with letters that cannot be seen as escapes.

    Control characters would steer a terminal, lone surrogates cannot be written as UTF-8, and marks
    of direction would turn over what stands beside them.

    Args:
        text: what to show.
        keep: characters that stay whatever they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if c not in keep and _hidden(c) else c for c in text
    )


def _hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def shortened(text: str, most: int) -> str:
    """``text``, or its head and tail where it is longer than about ``most`` characters."""
    if len(text) <= most:
        return text
    tail = most // 3
    head = most - tail
    return f"{text[:head]} … [{len(text) - most} characters left out] … {text[-tail:]}"


def name(text: str, most: int = _LONGEST_NAME) -> str:
    """A name in a table, a line or a picture: one line, at most ``most`` characters."""
    text = visible(text, keep="")
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def one_line(text: str) -> str:
    """An error on the console, where a line has to do."""
    return visible(shortened(" ".join(text.split()), _LONGEST_LINE))


def error_text(error: BaseException) -> str:
    """Type and message of an error, shortened, also when its message cannot be had."""
    try:
        message = str(error)
    except Exception as second:
        message = f"(its message could not be read: {type(second).__name__})"
    return shortened(f"{type(error).__name__}: {message}", LONGEST_ERROR)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print ``text`` at once; letters that the console does not have become escapes.

    Raises:
        OSError: nobody reads the console any more, or it is a file on a full disk.
    """
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        # What is left in the buffer would raise once more when the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise


def complain(text: str, command: str = "compare") -> None:
    """Print a message on stderr, if it is there to be written to."""
    try:
        say(f"lightning-mtl {command}: {text}", sys.stderr)
    except OSError:
        return  # there is nowhere else to say it
