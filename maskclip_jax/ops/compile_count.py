"""Counting compiled programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileCount:
    """Programs that XLA compiled inside `count_compiles`, and the seconds it took."""

    def __init__(self):
        self.programs = 0
        self.seconds = 0.0

    def __call__(self, event: str, duration: float, **_) -> None:
        if event == COMPILED:
            self.programs += 1
            self.seconds += duration


@contextlib.contextmanager
def count_compiles() -> Iterator[CompileCount]:
    """`with count_compiles() as count: …; print(count.programs)`: everything compiled in this process meanwhile."""
    count = CompileCount()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
