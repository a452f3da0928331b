"""The body of a request: JSON, no more of it than is allowed, and no longer waited for. Reads no field."""

from __future__ import annotations

import anyio
from starlette.requests import Request

from framefusion.errors import RequestError


async def read_body(request: Request, most_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Args:
        request: of which nothing was read.
        most_bytes: of the body.
        seconds: for it to arrive.

    Raises:
        RequestError: it is of another type, too large, or does not come.
        ClientDisconnect: the client left before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body is {kind[:80] or 'of no type'}: send JSON, with Content-Type: application/json", status=415
        )
    too_large = RequestError(f"the body has more than {most_bytes} bytes: send a shorter or smaller film", status=413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most_bytes:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for block in request.stream():
                body += block
                if len(body) > most_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not come within {seconds:g} s: send it faster", status=408) from None
    return bytes(body)
