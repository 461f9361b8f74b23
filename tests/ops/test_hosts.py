"""Where Ctrl-C and SIGTERM go, and that they come back; several hosts are tested with real processes in `distill`."""

import os
import signal
import threading

import pytest

from maskclip_jax.ops.hosts import stop_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def pythons_own():
    """A shell's background job inherits that Ctrl-C is ignored: these tests begin with Python's own handlers."""
    before = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_handler_hears_and_the_one_before_comes_back(number):
    before, heard = handlers(), []
    with stop_signals(lambda number, frame: heard.append(number)):
        os.kill(os.getpid(), number)
        assert heard == [number]
    assert handlers() == before


def test_given_back_early_the_second_one_acts_as_before():
    before = handlers()
    with stop_signals(lambda *_: give_back()) as give_back:
        os.kill(os.getpid(), signal.SIGINT)
        assert handlers() == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_handler_that_no_python_set_is_given_back(monkeypatch):
    """`signal.signal` returns None for one that a C library set, and takes no None."""
    given = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: given.append((number, handler)))
    with stop_signals(signal.SIG_IGN):
        assert given == [(number, signal.SIG_IGN) for number in SIGNALS]
        given.clear()
    assert sorted(given) == sorted((number, signal.SIG_DFL) for number in SIGNALS)


def test_another_thread_changes_nothing():
    before, found = handlers(), []

    def within():
        with stop_signals(signal.SIG_IGN):
            found.append(handlers())

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert found == [before]
