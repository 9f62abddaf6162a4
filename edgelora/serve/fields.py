"""The fields of a request's JSON object, each read once with its type and range; what nobody read is refused at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from edgelora.errors import did_you_mean
from edgelora.serve.refusal import Refusal, wrong

KINDS: dict[type, str] = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip
SHOWN = 60  # characters of a wrong value that a message repeats


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises Refusal where it is none, or holds text that has no UTF-8 form."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start}") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise Refusal(422, f"the body holds half a character ({half}): wrong encoding") from None
    except RecursionError:
        raise Refusal(400, "the body is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is {name_of(value)}; a JSON object is wanted")
    return value


def no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def name_of(value: Any) -> str:
    """Return what kind of JSON value it is: "a string"."""
    return KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Return a value as JSON for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class Fields:
    """Reads fields by name; null counts as absent, as in OpenAI's interface."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.given = {name: value for name, value in body.items() if value is not None}
        self.left = dict(self.given)
        self.known: list[str] = []

    def take(self, name: str) -> Any:
        """Return a field as it is, None where it is absent."""
        self.known.append(name)
        return self.left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, f"is {name_of(value)}; a string is wanted")
        return value

    def switch(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, f"is {name_of(value)}; true or false is wanted")
        return bool(value)

    def number(self, name: str, low: float, high: float = math.inf) -> float | None:
        """Return a number from `low` to `high`, None where it is absent."""
        value = self._between(name, (int, float), "a number", low, high)
        return None if value is None else float(value)

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """Return a whole number from `low` to `high`, None where it is absent."""
        value = self._between(name, (int,), "a whole number", low, math.inf if high is None else high)
        return None if value is None else int(value)

    def _between(self, name: str, kinds: tuple[type, ...], wanted: str, low: float, high: float) -> Any:
        value = self.take(name)
        if value is None:
            return None
        if type(value) not in kinds:
            raise wrong(name, f"is {shown(value)}; {wanted} is wanted")
        if not low <= value <= high:
            allowed = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
            raise wrong(name, f"is {shown(value)}; allowed: {allowed}")
        return value

    def only(self, name: str, allowed: Collection[Any], problem: str) -> None:
        """Refuse a field that says anything but what happens anyway."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in allowed):
            raise wrong(name, problem, code="unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Accept fields that change no answer: labels for the service's own books."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Refuse what was not read, by name, with the closest name that is known."""
        for name in self.left:
            close = did_you_mean(name, self.known)
            message = f'"{name[:SHOWN]}" is not a field of this request.{close}'
            raise Refusal(400, message, param=name[:SHOWN], code="unknown_parameter")
