"""A request that is not answered: the status and the error object that OpenAI's clients read."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from edgelora import console
from edgelora.errors import EdgeLoRAError, FolderError, MachineError

SERVER_ERROR = 500  # from here on the fault is not the request's
RETRY_AFTER_S = 1


class Refusal(Exception):
    """`param` names the field at fault, `code` is for programs. Statuses:

    400 a field is missing, wrong or not supported    401 the API key             403 asked by a page of another site
    404 no such path, model, or not by this bundle    405 another method          408 the body did not come
    413 the body is too large                         415 the body is not JSON    422 well-formed, but the model refuses it
    429 too many requests wait                        500 a defect                503 too late, stopping, or out of memory
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return {"error": …}."""
        kind = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with the status: clients try again after 429 and 503."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


def wrong(param: str, problem: str, *, code: str | None = None) -> Refusal:
    """Return the refusal of a field: its name, then what is wrong and what is allowed."""
    return Refusal(400, f'"{param}" {problem}', param=param, code=code)


def as_refusal(error: Exception) -> Refusal:
    """Return what a client is told of an error. Hints are for the command line; defects and paths are for the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, EdgeLoRAError) and not isinstance(error, MachineError | FolderError):
        return Refusal(422, error.message, code="unprocessable")
    console.warn(f"a request failed: {type(error).__name__}: {' '.join(str(error).split())}")
    if os.environ.get("EDGELORA_TRACEBACK"):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, MemoryError | MachineError):
        return Refusal(503, "the server is out of memory", code="out_of_memory")
    return Refusal(500, "the server has failed on this request", code="internal_error")
