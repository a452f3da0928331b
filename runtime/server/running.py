"""Running the application with uvicorn: an address, connections that say nothing closed, a drain at the end."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from framefusion.errors import ServerError
from framefusion.runtime.server.app import Access, create_app
from framefusion.runtime.server.service import Service

HEADER_SECONDS = 20.0
"""For the head of a request to arrive; uvicorn itself waits for ever."""
DRAIN_SECONDS = 30
"""For running answers to end, once the server is to."""
TAKE_SECONDS = 60.0
"""For a client to take what its receive buffer and this machine's send buffer have no room for."""
CONNECTIONS = 256


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: name or address.
        port: 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8000


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that ends a connection on which no whole head of a request arrives in time, or that takes no answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _take_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing is paused as soon as anything waits for the client
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what came; a head that is begun has to end in time."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Run a timer while a head is awaited. Between two requests uvicorn's own runs."""
        awaited = self.conn.their_state is h11.IDLE
        if awaited and self._head_timer is None:
            self._head_timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, self.transport.close)
        elif not awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """Something waits for the client: it has to be taken in time. Closing would wait for that without an end."""
        super().pause_writing()
        self._take_timer = asyncio.get_running_loop().call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """All was taken."""
        if self._take_timer is not None:
            self._take_timer.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        for timer in (self._head_timer, self._take_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


def listen(address: Address) -> socket.socket:
    """The socket of a server.

    Raises:
        ServerError: the address is taken, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address.host, address.port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise ServerError(
            f"{address.host}:{address.port} cannot be listened on ({error.strerror or error}): choose another --port, "
            "or end what listens there"
        ) from error


def run(service: Service, access: Access, opened: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM: then take no more, let what runs end, and free all.

    Args:
        service: not started.
        access: who may ask.
        opened: what `listen` gave.
    """
    _log_to_stderr()
    config = uvicorn.Config(
        create_app(service, access),
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
        proxy_headers=False,
    )
    server = _Server(config)
    service.is_draining = lambda: server.should_exit  # so that what is asked on an open connection is sent elsewhere
    server.run(sockets=[opened])


def _log_to_stderr() -> None:
    """What the server does beside answering, with the time: evictions, fields that were ignored, failures."""
    logger = logging.getLogger("framefusion.server")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _Server(uvicorn.Server):
    """A server that frees what is held, however it ends."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, and wait for what runs; a second signal ends that at once, and frees what is held all the same.

        Args:
            sockets: that are listened on.
        """
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()
