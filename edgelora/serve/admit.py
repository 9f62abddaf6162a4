"""At the door: who asks, from where, with what, and how much of it is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from starlette.requests import Request

from edgelora.serve.refusal import Refusal

BODY_S = 30.0  # for a body to arrive
DRAINED = 8  # times the limit: what is read of a body too large, so that its client comes to read the answer


def check(request: Request, key: str | None, *, local: bool) -> None:
    """Raise Refusal where the key is wrong, or where a page of another site asks a server without a key.

    A page in a browser of this machine reaches its loopback address too. It is kept out by the content type, which browsers
    send across sites only after a preflight that is never granted, and, where the page's own name resolves to this machine
    (DNS rebinding), by the Host header. With a key, which such pages do not have, any Host is fine.
    """
    if key is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            problem = "is wrong" if given else "is missing; send it as Authorization: Bearer KEY"
            raise Refusal(401, f"the API key {problem}", code="invalid_api_key")
    elif local and not is_local(request.headers.get("host", "")):
        message = "without an API key only requests to localhost or a loopback address are answered"
        raise Refusal(403, message, code="foreign_host")
    if request.method == "POST":
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f'the content type is "{kind[:60]}"; "application/json" is wanted')


def is_local(host: str) -> bool:
    """Tell whether a Host header names this machine: "localhost:8000", "127.0.0.1", "[::1]:8000"."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises Refusal where it has more than `limit` bytes or does not come."""
    declared = request.headers.get("content-length", "0")
    size, parts = 0, []
    if not declared.isdigit() or int(declared) <= DRAINED * limit:
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                    elif size > DRAINED * limit:
                        break
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_S:g} s") from None
    if size > limit or (not parts and declared.isdigit() and int(declared) > limit):
        raise Refusal(413, f"the body has more than {limit} bytes, which is the limit", code="body_too_large")
    return b"".join(parts)
