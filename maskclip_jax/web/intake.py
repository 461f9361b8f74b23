"""Limits on connections: bytes of a body, seconds that a client may take.

A body waits in memory until it is whole, so all bodies together have a limit; and a client that sends or
reads slower than any line of today is disconnected, for there is a limit to connections, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskclip_jax.errors import UserError

MEGABYTE = 2**20
MOST_CONNECTIONS = 256
HEAD_SECONDS = 15  # for a request's first lines
PAUSE_SECONDS = 15  # without a byte of a body
BODY_SECONDS = 120  # for a body in all
READ_SECONDS = 300  # for taking an answer


class Busy(UserError):
    """Too many are waiting."""


class TooLarge(UserError):
    """A body over the limit."""


class Slow(UserError):
    """A body that did not come in time."""


class Intake:
    """Reads bodies, at most `budget` bytes of them at once."""

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0

    @contextlib.asynccontextmanager
    async def body_of(self, request: Request, most: int, what: str) -> AsyncIterator[bytes]:
        """The body, counted until the context is left.

        What is a little too large is read to its end all the same: a browser that is still sending would otherwise
        report a lost connection instead of the message.

        Raises:
          TooLarge: it has more than `most` bytes.
          Busy: other bodies take all the room there is.
          Slow: it does not come in time.
        """
        body = bytearray()  # of its own count: whatever happens, it is given back
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    size = await self._read(request, most, body)
            except TimeoutError as error:
                raise Slow(
                    f"{what} is sent within {BODY_SECONDS} seconds and without breaks, but this was not: try again"
                ) from error
            if size > most:
                raise TooLarge(f"{what} has at most {_size(most)} here, but this one has more: make it smaller")
            yield bytes(body)
        finally:
            self.nbytes -= len(body)

    async def _read(self, request: Request, most: int, body: bytearray) -> int:
        """Fills `body`, unless there is more than `most`; returns how much came."""
        size, chunks = 0, request.stream()
        while (chunk := await asyncio.wait_for(anext(chunks, None), PAUSE_SECONDS)) is not None and size <= 8 * most:
            size += len(chunk)
            if size > most:
                self.nbytes -= len(body)
                body.clear()
            elif self.nbytes + len(chunk) > self.budget:
                raise Busy("uploads in progress take all the room there is: try again in a moment")
            else:
                self.nbytes += len(chunk)
                body += chunk
        return size


class Protocol(H11Protocol):
    """HTTP/1.1 that disconnects a client that sends no request, or does not take the answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._wait(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait(None)  # the request has come: it is our turn, and `Intake` looks after the body
        elif self._timer is None:
            self._wait(HEAD_SECONDS)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_reader()

    def pause_writing(self) -> None:
        """There is more to send than the other side has taken."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """It has taken it."""
        super().resume_writing()
        self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        complete = self.cycle is not None and self.cycle.response_complete
        if self.flow.write_paused or self.transport.is_closing():
            self._wait(READ_SECONDS)
        else:
            self._wait(HEAD_SECONDS if complete else None)

    def _wait(self, seconds: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


def make_server(app: ASGIApp, *, log_level: str = "error") -> uvicorn.Server:
    """A server of the application with all of these limits."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            log_level=log_level,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=5,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
        )
    )


def _size(count: int) -> str:
    return f"{count / MEGABYTE:.3g} MB" if count >= MEGABYTE else f"{count / 1024:.3g} kB"
