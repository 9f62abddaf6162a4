"""A value that a thread computes while something else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """Begins at once. What goes wrong is raised by `result`."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self.compute = compute
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.value = self.compute()
        except BaseException as error:
            self.error = error

    def result(self) -> T:
        """Wait for the value and return it."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.value
