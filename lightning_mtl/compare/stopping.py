"""Ctrl-C and SIGTERM: where they may end the comparison, and where they have to wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the comparison; like KeyboardInterrupt, no ``except Exception`` stops it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Holding:
    """Whether signals have to wait, and the one that does."""

    depth = 0
    waiting: int | None = None


_holding = _Holding()


def _handle(number: int, _: Any) -> None:
    if _holding.depth:
        _holding.waiting = number
    else:
        raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the signals into :class:`Stopped`; those that the process was told to ignore stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread of a process hears signals
        return
    before = {s: signal.getsignal(s) for s in _SIGNALS}
    heard = [s for s, handler in before.items() if handler is not signal.SIG_IGN]
    for s in heard:
        signal.signal(s, _handle)
    try:
        yield
    finally:
        for s in heard:
            signal.signal(s, before[s])


def deaf() -> None:
    """Ignore further signals until the end of :func:`stoppable`: the comparison is ending."""
    if threading.current_thread() is threading.main_thread():
        for s in _SIGNALS:
            signal.signal(s, signal.SIG_IGN)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals wait until the end of the block: a record is written, a process is known."""
    _holding.depth += 1
    try:
        yield
    finally:
        _holding.depth -= 1
        number, _holding.waiting = _holding.waiting, None
    if number is not None:
        _handle(number, None)


def left_to_parent() -> None:
    """In a worker: ignore Ctrl-C, which a terminal sends to all, and end at SIGTERM as others do.

    The command ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
