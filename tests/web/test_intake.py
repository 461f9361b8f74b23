"""Bodies within a number of bytes, and connections that end: with clients that send and read as they like."""

# ruff: noqa: E402

import contextlib
import socket
import threading
import time

import pytest

REASON = "the web extra is not installed: pip install -r requirements-web.txt"
pytest.importorskip("uvicorn", reason=REASON)
pytest.importorskip("starlette", reason=REASON)

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from web_calls import call

from maskclip_jax.errors import UserError
from maskclip_jax.web import intake
from maskclip_jax.web.server import STATUS

LARGE = 2**23  # more than a socket's buffers hold


@pytest.fixture
def small(monkeypatch):
    """(port, intake) of a server with room for 1000 bytes of bodies of at most 600, and little patience."""
    for name in ("HEAD_SECONDS", "PAUSE_SECONDS", "BODY_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(intake, name, 1)
    held = intake.Intake(1000)

    async def receive(request):
        async with held.body_of(request, 600, "a file") as data:
            return PlainTextResponse(f"{len(data)} of {held.nbytes}")

    async def large(request):
        return Response(bytes(LARGE))

    async def failed(request, error):
        return PlainTextResponse(str(error), STATUS[type(error)])

    routes = [Route("/", receive, methods=["POST"]), Route("/large", large)]
    server = intake.make_server(Starlette(routes=routes, exception_handlers={UserError: failed}), log_level="critical")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listener.getsockname()[1], held
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextlib.contextmanager
def sending(port, data=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(data)
        yield client


def answer(client) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(2**16):
            data += part
    return data


def head(length, path="/"):
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()


def until(true):
    """Waits for what another thread does."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_bodies_have_a_size(small):
    port, held = small
    url = f"http://127.0.0.1:{port}/"
    assert call(url, b"x" * 600).data == b"600 of 600"
    assert call(url, b"x" * 601).status == 413
    assert b"a file has at most 0.586 kB here" in call(url, b"x" * 601).data
    assert call(url, b"").data == b"0 of 0"
    until(lambda: held.nbytes == 0)


def test_unfinished_bodies_have_a_size_together(small):
    port, held = small
    with sending(port, head(600) + b"x" * 500), sending(port, head(600) + b"x" * 450):
        until(lambda: held.nbytes == 950)
        with sending(port, head(600) + b"x" * 100) as third:
            assert third.recv(20).startswith(b"HTTP/1.1 503")
        assert held.nbytes <= 950
    until(lambda: held.nbytes == 0)  # gone clients give back what they took
    assert call(f"http://127.0.0.1:{port}/", b"x" * 600).data == b"600 of 600"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /large HTTP/1.1\r\nHost: a\r\nX: ", head(600)[:-2]])
def test_who_sends_no_request_is_let_go(small, sent):
    with sending(small[0], sent) as client:
        assert answer(client) == b""


def test_who_sends_no_body_is_told_and_let_go(small):
    port, held = small
    with sending(port, head(600) + b"x" * 10) as client:
        assert answer(client).startswith(b"HTTP/1.1 408")
    with sending(port, head(600)) as client:  # a byte now and then is no sending either
        client.settimeout(0.3)
        data, end = b"", time.monotonic() + 15
        while b"408" not in data and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                client.sendall(b"x")
                data += client.recv(100)
        assert data.startswith(b"HTTP/1.1 408")
    until(lambda: held.nbytes == 0)


def test_who_does_not_read_is_let_go(small):
    with sending(small[0], b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        time.sleep(2.5)
        assert len(answer(client)) < LARGE
    assert len(call(f"http://127.0.0.1:{small[0]}/large").data) == LARGE
