"""Ctrl-C and SIGTERM while training: the first asks the loop to stop at a safe point, the second stops at once.

Not while a checkpoint is written: that is finished first. What leaves nothing half done ends at the first signal already.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`requested` turns true at the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self.waits = False  # inside of `finishing`
        self.ends = False  # inside of `ending_at_once`

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if (again or self.ends) and not self.waits:
            raise KeyboardInterrupt

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let no signal end the block: what it writes must become whole."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Let the first signal raise KeyboardInterrupt inside of the block, or a signal before it raise at its start."""
        self.ends = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self.ends = False


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs. Only the main thread may; elsewhere nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
