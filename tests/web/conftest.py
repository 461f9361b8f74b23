"""The embedded model on a models, a session, and a server of it on a free port of this machine."""

import socket
import threading
import time

import pytest

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.web.models import Models
from maskclip_jax.web.session import Session

MOST_UPLOAD = 2**20
PROGRAM_BYTES = 2**26  # so few that they are reached


@pytest.fixture(scope="session")
def models():
    return Models(["embedded", "embedded-resnet"], load_clip)


@pytest.fixture
def session(models):
    """With nothing in its memory yet."""
    return Session(models, most_pixels=1_000_000)


@pytest.fixture(scope="session")
def server(models):
    """(address, session) of a running server that takes images of at most `MOST_UPLOAD` bytes."""
    reason = "the web extra is not installed: pip install -r requirements-web.txt"
    pytest.importorskip("uvicorn", reason=reason)
    pytest.importorskip("starlette", reason=reason)
    from maskclip_jax.cli.process import give_back_after_compiling, keep_memory
    from maskclip_jax.web.intake import make_server
    from maskclip_jax.web.server import make_app

    keep_memory()  # both as `serve` does
    give_back_after_compiling()
    session = Session(models, most_pixels=1_000_000)
    app = make_app(session, most_upload=MOST_UPLOAD, program_bytes=PROGRAM_BYTES)
    running = make_server(app, log_level="critical")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", session
        running.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()
